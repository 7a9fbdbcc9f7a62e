#!/bin/sh
# Install Debian packages, as root or through sudo without a password; else say what to install.
set -eu
if [ "$(id -u)" = 0 ]; then as_root=""; elif sudo -n true 2>/dev/null; then as_root="sudo"; else
    echo "please install: $*  (sudo apt-get install $*)" >&2
    exit 1
fi
$as_root apt-get update -qq
# A package's service must not start by itself: tests start their own servers.
$as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$@" >/dev/null
