// The newest events, in words; or those before a place chosen on the timeline.

import { by, make, named } from "./dom.js";
import { action, count, minute, title } from "./words.js";

const PAGE = 12;

export class Events {
  constructor(actions) {
    this.actions = actions;
    this.answer = null;
    by("older").addEventListener("click", () => this.older());
    by("newest").addEventListener("click", () => {
      this.from(null);
      by("events-title").scrollIntoView({ block: "nearest" });
    });
  }

  show(answer, { grown = false } = {}) {
    this.answer = answer;
    this.grown = grown;
    this.from(null);
  }

  // Newest first from the event at `place`; null: from the newest.
  from(place) {
    const last = this.answer.history.items.length - 1;
    this.next = place === null ? last : place;
    const elsewhere = place !== null && place < last;
    by("newest").hidden = !elsewhere;
    by("events-title").textContent = elsewhere ? `Events from number ${count(this.number(place))} back` : "Newest events";
    by("events").replaceChildren();
    this.older();
  }

  // An event's number, from 1, in the whole history.
  number(place) {
    return this.answer.total - this.answer.history.items.length + place + 1;
  }

  older() {
    const { items, actions, times } = this.answer.history;
    const start = this.next;
    const rows = [];
    for (; this.next >= 0 && start - this.next < PAGE; this.next -= 1) {
      const place = this.next;
      const fresh = this.grown && place === items.length - 1;
      rows.push(
        make(
          "li",
          { class: fresh ? "fresh" : "" },
          named(title(this.answer.items[items[place]]), { class: "name" }),
          make("span", { class: "meta" }, named(action(this.actions[actions[place] - 1] ?? "?"), { class: "tag" }), make("time", { datetime: new Date(times[place] * 1000).toISOString() }, minute(times[place]))),
          fresh ? make("span", { class: "move new" }, "new") : null,
        ),
      );
    }
    if (!items.length) rows.push(make("li", { class: "nothing" }, this.answer.unavailable ? "The history cannot be read just now." : "No events yet."));
    by("events").append(...rows);
    by("older").hidden = this.next < 0;
    if (this.next < 0 && this.answer.total > items.length) {
      by("events").append(make("li", { class: "nothing" }, `${count(this.answer.total - items.length)} older events are not kept here.`));
    }
  }
}
