// The page: a user, two arms, and what a pick changes. Its state stands in the address (#user=…&a=…&b=…), so that a view can be shared.

import * as api from "./api.js";
import { by, make, named } from "./dom.js";
import { Events } from "./events.js";
import { List } from "./lists.js";
import { People } from "./people.js";
import { Timeline } from "./timeline.js";
import { action, arm, count, many, since, title } from "./words.js";

const K = 10;

class Page {
  constructor() {
    this.answer = null;
    this.pinned = null;
    this.asked = null;
    this.again = () => this.start();
    by("retry").addEventListener("click", () => this.again());
    by("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      api.useToken(by("token").value);
      this.again();
    });
  }

  async start() {
    this.again = () => this.start();
    try {
      this.setup = await api.setup();
    } catch (error) {
      return this.fail(error);
    }
    this.fail(null);
    const { arms, actions, suggestions } = this.setup;
    const wanted = new URLSearchParams(location.hash.slice(1));
    const names = arms.map((one) => one.name);
    const given = (name, otherwise) => (names.includes(wanted.get(name)) ? wanted.get(name) : otherwise);
    this.arms = [given("a", names[0]), given("b", names[1] ?? names[0])];
    this.people = new People(suggestions, (key) => this.look(key));
    this.timeline = new Timeline(actions, (place) => this.events.from(place));
    this.events = new Events(actions);
    const handlers = { point: (at) => this.point(at), pin: (at) => this.pin(at), pick: (item) => this.pick(item) };
    this.lists = [new List("a", handlers), new List("b", handlers)];
    this.choices(names, actions);
    const user = wanted.get("user") || suggestions[0]?.user_id;
    if (user) await this.look(user);
    else by("user").focus();
  }

  choices(names, actions) {
    ["a", "b"].forEach((letter, side) => {
      const select = by(`arm-${letter}`);
      select.replaceChildren(...names.map((name) => make("option", { value: name }, arm(name))));
      select.value = this.arms[side];
      select.addEventListener("change", () => {
        this.arms[side] = select.value;
        this.look(this.user);
      });
    });
    // The strongest of a scale or the plainest of deeds is a guess; whoever looks can choose.
    by("action").replaceChildren(...actions.map((name) => make("option", { value: name }, action(name))));
    by("action").value = actions.includes("click") ? "click" : actions[actions.length - 1];
    by("action").addEventListener("change", () => this.lists.forEach((list) => this.answer && list.relabel(this.answer, by("action").value)));
    for (const button of by("sides").children) button.addEventListener("click", () => this.turn(button.dataset.side));
  }

  // Which list a narrow screen shows.
  turn(side) {
    by("lists").dataset.side = side;
    document.body.dataset.side = side;
    for (const button of by("sides").children) button.setAttribute("aria-pressed", String(button.dataset.side === side));
  }

  // Ask for a user's history and lists, and show them. `picked`: what was just recorded.
  async look(user, { picked = null } = {}) {
    this.asked?.abort();
    const asked = (this.asked = new AbortController());
    this.again = () => this.look(user, { picked });
    document.body.classList.add("waiting");
    let answer;
    try {
      answer = await api.explain(user, this.arms, K, asked.signal);
    } catch (error) {
      if (!asked.signal.aborted) {
        document.body.classList.remove("waiting");
        this.fail(error);
      }
      return;
    }
    document.body.classList.remove("waiting");
    this.fail(null);
    this.show(decoded(answer), picked);
  }

  show(answer, picked) {
    const shown = this.answer;
    this.answer = answer;
    this.user = answer.user_id;
    history.replaceState(null, "", `#${new URLSearchParams({ user: this.user, a: this.arms[0], b: this.arms[1] })}`);
    this.people.show(this.user);
    this.head(answer);
    const grown = Boolean(picked) && shown?.user_id === answer.user_id && answer.total > shown.total;
    this.timeline.show(answer, { grown });
    this.events.show(answer, { grown });
    const changes = this.lists.map((list) => list.show(answer, by("action").value, { moved: Boolean(picked) }));
    [...by("sides").children].forEach((button, side) => button.replaceChildren(make("span", { class: "dot" }), named(arm(answer.arms[side].name))));
    this.changed(answer, picked, changes);
    this.pin(answer.explained.length ? 0 : null);
  }

  head(answer) {
    by("history-title").replaceChildren("History of ", named(answer.user_id));
    const { times } = answer.history;
    const length = times.length;
    const kept = length < answer.total ? `the newest ${count(length)} of ${many(answer.total, "event")}` : many(answer.total, "event");
    by("history-facts").textContent = length ? `${kept}, ${since(times[0], times[length - 1])}` : "no events yet";
    const popular = answer.arms.find((one) => one.fallback);
    const words = answer.unavailable
      ? `The history cannot be read (${answer.unavailable}), so everybody gets the most popular items.`
      : !answer.known
        ? "Nobody knows this user, so both lists are the most popular items. Pick one: the first event makes them known, and the next lists are their own."
        : popular ? `The most popular items are shown (${popular.fallback}).` : "";
    by("notice").textContent = words;
    by("notice").hidden = !words;
  }

  changed(answer, picked, changes) {
    const line = by("changed");
    if (!picked) return line.replaceChildren();
    const parts = [make("b", {}, "Recorded "), named(action(picked.action)), " for ", named(picked.title, { class: "strong" }), ". "];
    changes.forEach(({ changed, came, left, first }, side) => {
      if (side && answer.arms[1].name === answer.arms[0].name) return;
      const gone = left.filter((name) => name !== picked.title).length;
      const words = [changed && `${changed} moved`, came.length && `${came.length} new`, gone && `${gone} left`].filter(Boolean).join(", ");
      parts.push(make("span", { class: `side ${"ab"[side]}` }, make("span", { class: "dot" }), `${arm(answer.arms[side].name)}: ${first ? "a list of their own now" : words || "the same order"}`), " ");
    });
    line.replaceChildren(...parts);
  }

  // A place among the answer's explained items that the pointer or the focus is on; null: back to the pinned one.
  point(at) {
    const active = at ?? this.pinned;
    this.timeline.explain(active);
    this.lists.forEach((list) => list.mark(active, this.pinned));
  }

  pin(at) {
    this.pinned = at;
    this.point(at);
  }

  async pick(item, id = api.newId()) {
    if (document.body.classList.contains("waiting")) return;
    const row = this.answer.items[item];
    const picked = { action: by("action").value, title: title(row) };
    const user = this.user;
    this.again = () => this.pick(item, id); // the same id: what arrived the first time is not counted again
    document.body.classList.add("waiting");
    try {
      await api.pick(user, row[0], picked.action, id);
    } catch (error) {
      document.body.classList.remove("waiting");
      return this.fail(error);
    }
    await this.look(user, { picked });
  }

  fail(error) {
    by("trouble").hidden = !error;
    clearTimeout(this.timer);
    if (!error) return;
    const wait = error.wait ? ` Trying again in ${many(error.wait, "second")}.` : "";
    by("trouble-text").textContent = (error instanceof api.Trouble ? error.message : "Something went wrong on this page.") + wait;
    const token = error.status === 401 || error.status === 403;
    by("token-form").hidden = !token;
    by("retry").hidden = token;
    if (token) by("token").focus();
    if (wait) this.timer = setTimeout(() => this.again(), error.wait * 1000);
    if (!(error instanceof api.Trouble)) throw error;
  }
}

// Weights travel as signed bytes.
function decoded(answer) {
  for (const one of answer.arms) {
    for (const pass of one.passes) {
      for (const told of pass) told.bytes = Int8Array.from(atob(told.bytes), (letter) => letter.charCodeAt(0));
    }
  }
  return answer;
}

document.body.dataset.side = "a";
new Page().start();
