// One arm's list. Rows keep their elements while they keep their item, so that moves can be seen and the focus stays where it was.

import { by, calm, make, named } from "./dom.js";
import { action, arm, many, ordinal, score, title } from "./words.js";

const SLIDE = 450; // ms

export class List {
  // handlers: point(item or null), pin(item), pick(item, list); items are places among the answer's `explained`.
  constructor(letter, handlers) {
    this.letter = letter;
    this.side = letter === "a" ? 0 : 1;
    this.handlers = handlers;
    this.items = by(`items-${letter}`);
    this.rows = new Map(); // item key -> { node, … }
    this.before = null;
  }

  // `moved`: the answer follows a pick, so that what changed is marked. Returns how many moved, titles that came and left, and whether
  // it is the first list of its kind, with nothing to compare it to.
  show(answer, actionName, { moved = false } = {}) {
    const one = answer.arms[this.side];
    const other = answer.arms[1 - this.side];
    const old = moved && this.before?.name === one.name && this.before.user === answer.user_id && this.before.personal === one.personal ? this.before : null;
    const tops = calm() ? null : this.tops();
    const focused = this.focused();
    const keys = one.list.map((item) => answer.items[item][0]);
    const left = old ? [...old.places.keys()].filter((key) => !keys.includes(key)).map((key) => old.titles.get(key)) : [];
    const came = [];
    let changed = 0;
    const first = moved && !old; // of a user whom nobody knew: another list altogether
    const explained = new Map(answer.explained.map((item, place) => [item, place]));
    const rows = new Map();
    one.list.forEach((item, place) => {
      const row = this.rows.get(keys[place]) ?? this.row();
      const was = old?.places.get(keys[place]);
      const move = !old ? null : was === undefined ? "new" : was - place;
      if (move === "new") came.push(title(answer.items[item]));
      else if (move) changed += 1;
      this.fill(row, { answer, one, other, at: explained.get(item), item, place, move, actionName, was: old?.scores.get(keys[place]) });
      rows.set(keys[place], row);
    });
    this.rows = rows;
    this.items.replaceChildren(...[...rows.values()].map((row) => row.node));
    if (!one.list.length) this.items.replaceChildren(make("li", { class: "nothing" }, "Nothing is left to recommend: this user has seen the whole catalogue."));
    if (old) this.slide(tops);
    this.refocus(focused);
    this.facts(answer, one);
    this.before = {
      name: one.name,
      personal: one.personal,
      user: answer.user_id,
      places: new Map(keys.map((key, place) => [key, place])),
      titles: new Map(one.list.map((item) => [answer.items[item][0], title(answer.items[item])])),
      scores: new Map(one.list.map((item) => [answer.items[item][0], one.scores[explained.get(item)]])),
    };
    return { changed, came, left, first };
  }

  facts(answer, one) {
    const words = one.personal
      ? `best of ${many(one.candidates, "candidate")}, ${one.milliseconds < 10 ? one.milliseconds.toFixed(1) : one.milliseconds.toFixed(0)} ms`
      : one.fallback ? `most popular: ${one.fallback}` : "most popular, the same for everyone";
    by(`facts-${this.letter}`).textContent = words;
  }

  row() {
    const row = { place: make("span", { class: "place" }), name: named(""), move: make("span", { class: "move" }), more: make("span", { class: "more" }) };
    row.score = make("span", { class: "score" });
    row.bar = make("span", { class: "fill" });
    row.why = make(
      "button",
      { type: "button", class: "item", onclick: () => this.handlers.pin(row.at), onfocus: () => this.handlers.point(row.at), onblur: () => this.handlers.point(null) },
      row.place,
      make("span", { class: "text" }, make("span", { class: "name" }, row.name, row.move), row.more),
      make("span", { class: "worth" }, row.score, make("span", { class: "bar", "aria-hidden": "true" }, row.bar)),
    );
    row.pick = make("button", { type: "button", class: "pick", onclick: () => this.handlers.pick(row.item, this) });
    row.node = make("li", { onpointerenter: (event) => event.pointerType === "mouse" && this.handlers.point(row.at), onpointerleave: (event) => event.pointerType === "mouse" && this.handlers.point(null) }, row.why, row.pick);
    return row;
  }

  fill(row, { answer, one, other, at, item, place, move, actionName, was }) {
    const value = one.scores[at];
    row.at = at;
    row.item = item;
    row.place.textContent = String(place + 1);
    row.name.textContent = title(answer.items[item]);
    row.score.textContent = score(value);
    row.bar.style.width = `${Math.max(1, 100 * value)}%`;
    row.move.className = `move ${move === "new" ? "new" : move > 0 ? "up" : move < 0 ? "down" : ""}`;
    row.move.replaceChildren(...moveWords(move));
    row.more.textContent = elsewhere(one, other, at) + (was === undefined || move === null ? "" : gained(value - was));
    row.pick.replaceChildren(make("span", { "aria-hidden": "true" }, "+ "), named(action(actionName)));
    row.pick.setAttribute("aria-label", `Record ${action(actionName)} for ${title(answer.items[item])}`);
  }

  relabel(answer, actionName) {
    for (const row of this.rows.values()) {
      row.pick.replaceChildren(make("span", { "aria-hidden": "true" }, "+ "), named(action(actionName)));
      row.pick.setAttribute("aria-label", `Record ${action(actionName)} for ${title(answer.items[row.item])}`);
    }
  }

  mark(at, pinned) {
    for (const row of this.rows.values()) {
      row.node.classList.toggle("shown", row.at === at);
      row.why.setAttribute("aria-pressed", String(row.at === pinned));
    }
  }

  tops() {
    return new Map([...this.rows].map(([key, row]) => [key, row.node.getBoundingClientRect().top]));
  }

  slide(tops) {
    if (!tops) return;
    for (const [key, row] of this.rows) {
      const from = tops.get(key);
      const way = from === undefined ? null : from - row.node.getBoundingClientRect().top;
      if (way === null) row.node.animate([{ opacity: 0 }, { opacity: 1 }], { duration: SLIDE, easing: "ease-out" });
      else if (way) row.node.animate([{ transform: `translateY(${way}px)` }, { transform: "none" }], { duration: SLIDE, easing: "cubic-bezier(.2,.7,.2,1)" });
    }
  }

  focused() {
    const rows = [...this.rows.values()];
    const place = rows.findIndex((row) => row.node.contains(document.activeElement));
    return place < 0 ? null : { place, kind: document.activeElement.className, row: rows[place] };
  }

  // An item that left takes the focus with it: it goes to whoever stands there now.
  refocus(focused) {
    if (!focused) return;
    const rows = [...this.rows.values()];
    const row = rows.includes(focused.row) ? focused.row : rows[Math.min(focused.place, rows.length - 1)];
    row?.node.querySelector(focused.kind.includes("pick") ? ".pick" : ".item")?.focus({ preventScroll: true });
  }
}

function moveWords(move) {
  if (move === null || move === 0) return [];
  if (move === "new") return ["new"];
  return [make("span", { "aria-hidden": "true" }, move > 0 ? "▲" : "▼"), make("span", { class: "sr" }, move > 0 ? "up " : "down "), String(Math.abs(move))];
}

function elsewhere(one, other, at) {
  if (!other || other.name === one.name || !(one.personal || other.personal)) return "";
  const place = other.places[at];
  if (place === null) return other.personal ? `${arm(other.name)}: not a candidate` : "";
  return `${arm(other.name)}: ${ordinal(place)}, ${score(other.scores[at])}`;
}

function gained(difference) {
  if (Math.abs(difference) < 0.0005) return "";
  const digits = Math.abs(difference) >= 0.01 ? 2 : 3;
  return ` · score ${difference > 0 ? "+" : "−"}${Math.abs(difference).toFixed(digits)}`;
}
