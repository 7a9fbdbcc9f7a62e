// Choosing a user: a text field with suggestions (WAI-ARIA combobox), and a few users to start with.

import * as api from "./api.js";
import { by, make, named } from "./dom.js";
import { many } from "./words.js";

const PAUSE = 150; // ms of no typing before a search
const NAMES = { longest: "longest", long: "long", typical: "typical", shortest: "short" };

export class People {
  // `onchoose(key)` is called with a user's key, known or not.
  constructor(suggestions, onchoose) {
    this.onchoose = onchoose;
    this.input = by("user");
    this.found = by("found");
    this.active = -1;
    this.input.addEventListener("input", () => this.later());
    this.input.addEventListener("keydown", (event) => this.key(event));
    this.input.addEventListener("blur", () => this.close());
    this.input.addEventListener("focus", () => this.input.select());
    this.found.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
    const chips = suggestions.map(({ user_id: key, events, why }) =>
      make("button", { type: "button", "data-user": key, onclick: () => this.choose(key) }, named(key, { class: "strong" }), make("span", {}, ` ${many(events, "event")}`), make("i", {}, NAMES[why] ?? "")),
    );
    chips.push(make("button", { type: "button", class: "visitor", onclick: () => this.choose(`visitor-${api.newId().slice(0, 6)}`) }, make("span", { class: "strong" }, "New visitor"), make("i", {}, "nobody knows them")));
    by("suggestions").replaceChildren(...chips);
  }

  show(key) {
    this.input.value = key;
    for (const chip of by("suggestions").children) chip.toggleAttribute("aria-current", chip.dataset.user === key);
  }

  choose(key) {
    this.close();
    this.show(key);
    this.onchoose(key);
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.search(), PAUSE);
  }

  async search() {
    this.asked?.abort();
    this.asked = new AbortController();
    const text = this.input.value;
    let users = [];
    try {
      users = text ? (await api.users(text, this.asked.signal)).users : [];
    } catch {
      return this.close(); // the field works without suggestions
    }
    if (document.activeElement !== this.input || this.input.value !== text) return;
    this.users = users;
    const options = users.map(({ user_id: key, events }, i) =>
      make("li", { role: "option", id: `found-${i}`, "aria-selected": "false", onclick: () => this.choose(key) }, named(key, { class: "strong" }), make("span", { class: "soft" }, many(events, "event"))),
    );
    if (!users.length && text) options.push(make("li", { class: "nothing", role: "option", "aria-disabled": "true" }, "No user's key begins so; Enter looks at a stranger of this name"));
    this.found.replaceChildren(...options);
    this.found.hidden = !options.length;
    this.input.setAttribute("aria-expanded", String(!this.found.hidden));
    this.activate(-1);
  }

  activate(i) {
    this.active = i;
    [...this.found.children].forEach((option, place) => option.setAttribute("aria-selected", String(place === i)));
    if (i >= 0) this.input.setAttribute("aria-activedescendant", `found-${i}`);
    else this.input.removeAttribute("aria-activedescendant");
  }

  key(event) {
    const options = this.found.hidden ? 0 : (this.users?.length ?? 0);
    if ((event.key === "ArrowDown" || event.key === "ArrowUp") && options) {
      event.preventDefault();
      const step = event.key === "ArrowDown" ? 1 : -1;
      this.activate((this.active + step + options) % options);
    } else if (event.key === "Enter" && this.input.value) {
      event.preventDefault();
      this.choose(this.active >= 0 ? this.users[this.active].user_id : this.input.value);
    } else if (event.key === "Escape") {
      this.close();
    }
  }

  close() {
    clearTimeout(this.timer);
    this.asked?.abort();
    this.found.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.activate(-1);
  }
}
