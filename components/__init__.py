"""The steps of the pipeline. Each is one typed function, declared once: `dvc.yaml` calls it by its command line, the Kubeflow component wraps it."""
