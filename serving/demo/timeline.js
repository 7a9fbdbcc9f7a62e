// The history as a strip of columns, and under it one row for each pass of each arm: what it weighed, on the same axis.
// However many events there are, there are never more columns than the screen has room for.

import { by, draw, make, named } from "./dom.js";
import { action, arm, count, many, minute, since, tick, times, title } from "./words.js";

const COLUMN = 4; // px of a column with its gap, at least
const WIDEST = 18;
const STRIP = 52; // px
const ROW = 28;
const SHADES = 4;
const PEAKS = 3; // behaviours marked in a row
const NAMED = 2; // and named beside it

export class Timeline {
  // `onevents(place)` is called with an event's place in the history when its column is chosen.
  constructor(actions, onevents) {
    this.actions = actions;
    this.onevents = onevents;
    this.byTime = false;
    this.answer = null;
    this.active = null;
    this.cursor = null;
    this.strip = by("strip");
    this.strip.addEventListener("keydown", (event) => this.key(event));
    this.strip.addEventListener("pointermove", (event) => this.point(this.columnAt(event)));
    this.strip.addEventListener("pointerleave", () => this.point(null));
    this.strip.addEventListener("blur", () => this.point(null));
    this.strip.addEventListener("click", (event) => this.choose(this.columnAt(event)));
    for (const [id, byTime] of [["by-order", false], ["by-time", true]]) {
      by(id).addEventListener("click", () => this.turn(byTime));
    }
    let width = 0;
    new ResizeObserver(() => {
      if (this.strip.clientWidth !== width) this.redraw();
      width = this.strip.clientWidth;
    }).observe(this.strip);
  }

  turn(byTime) {
    this.byTime = byTime;
    by("by-order").setAttribute("aria-pressed", String(!byTime));
    by("by-time").setAttribute("aria-pressed", String(byTime));
    this.redraw();
  }

  // A new answer of /demo/api/explain; `grown`: its newest event was just added.
  show(answer, { grown = false } = {}) {
    this.answer = answer;
    this.grown = grown;
    this.rows = [];
    const sections = answer.arms.flatMap((one, side) => this.section(one, side));
    by("passes").replaceChildren(...sections);
    this.redraw();
  }

  section(one, side) {
    const letter = "ab"[side];
    const passes = one.passes.length;
    if (!passes) {
      const words = one.fallback ? "the popular list: the history is not looked at" : one.kind && !this.answer.total ? "no history to look at" : "this ranker does not say what it looked at";
      return [make("p", { class: `plot none ${letter}` }, make("span", { class: "label" }, make("span", { class: "dot" }), arm(one.name)), make("span", { class: "said" }, words))];
    }
    return one.passes.map((_, pass) => {
      const what = one.kind === "behaviours" ? "nearest" : passes > 1 ? `pass ${pass + 1}` : "attention";
      const canvas = make("div", { class: "canvas" });
      const said = make("p", { class: "said" });
      this.rows.push({ one, side, pass, canvas, said });
      return make("div", { class: `plot row ${letter}` }, make("p", { class: "label" }, make("span", { class: "dot" }), arm(one.name), make("span", { class: "soft" }, ` ${what}`)), canvas, said);
    });
  }

  // Show what the arms looked at for one of the explained items, by its place among them; null: for none.
  explain(active) {
    this.active = active;
    this.drawRows();
    const item = active === null ? null : this.answer.items[this.answer.explained[active]];
    const words = item && this.rows.length ? ["Weighed for ", named(title(item), { class: "strong" }), make("span", {}, ". Named: the heaviest; 2× is twice the average behaviour.")] : [];
    by("why").replaceChildren(...words);
  }

  redraw() {
    if (!this.answer) return;
    const { times: at } = this.answer.history;
    const length = at.length;
    this.width = Math.max(40, this.strip.clientWidth);
    const most = Math.floor(this.width / COLUMN);
    this.columns = Math.max(1, this.byTime ? most : Math.min(most, length));
    this.step = this.byTime || length >= most ? this.width / this.columns : Math.min(WIDEST, this.width / this.columns);
    const first = at[0] ?? 0;
    const span = Math.max(1, (at[length - 1] ?? 0) - first);
    this.span = span;
    // Of times out of order, as late events are, none may fall outside.
    this.columnOf = this.byTime
      ? at.map((second) => Math.min(this.columns - 1, Math.max(0, Math.floor(((second - first) / (span + 1)) * this.columns))))
      : at.map((_, place) => Math.floor((place * this.columns) / length));
    this.drawStrip();
    this.drawAxis();
    this.drawRows();
    this.point(null);
    this.strip.setAttribute("aria-valuemax", String(this.columns));
  }

  drawStrip() {
    const { actions } = this.answer.history;
    const kinds = this.actions.length;
    const counts = Array.from({ length: this.columns }, () => new Uint32Array(kinds + 1));
    actions.forEach((kind, place) => (counts[this.columnOf[place]][kind] += 1));
    const tallest = counts.reduce((most, column) => Math.max(most, column.reduce((a, b) => a + b, 0)), 1);
    const paths = Array.from({ length: kinds + 1 }, () => "");
    counts.forEach((column, x) => {
      let top = STRIP;
      for (let kind = 1; kind <= kinds; kind += 1) {
        if (!column[kind]) continue;
        const height = (column[kind] / tallest) * (STRIP - 4);
        top -= height;
        paths[kind] += this.bar(x, top, height);
      }
    });
    this.counts = counts;
    const svg = this.canvas(STRIP);
    paths.forEach((path, kind) => path && svg.append(draw("path", { d: path, class: "act", "fill-opacity": this.shade(kind) })));
    this.mark = draw("rect", { class: "mark", y: 0, height: STRIP, width: Math.max(2, this.step), visibility: "hidden" });
    svg.append(this.mark);
    if (this.grown && actions.length) {
      svg.append(draw("rect", { class: "grown", x: this.columnOf[actions.length - 1] * this.step - 1, y: 0, width: Math.max(4, this.step + 1), height: STRIP }));
    }
    if (!actions.length) svg.append(draw("text", { class: "nothing-yet", x: this.width / 2, y: STRIP / 2 + 4 }, this.answer.unavailable ? "cannot be read just now" : "no events yet"));
    this.strip.replaceChildren(svg);
  }

  // Actions in the models' order, from light to dark.
  shade(kind) {
    return (0.25 + (0.75 * kind) / this.actions.length).toFixed(2);
  }

  drawAxis() {
    const { times: at } = this.answer.history;
    if (!at.length) return by("axis").replaceChildren();
    const used = this.step * this.columns;
    const ticks = Math.max(1, Math.min(at.length - 1, Math.floor(used / 130)));
    const marks = [];
    for (let i = 0; i <= ticks; i += 1) {
      const second = this.byTime ? at[0] + (this.span * i) / ticks : at[Math.round(((at.length - 1) * i) / ticks)];
      const mark = make("span", { class: i === 0 ? "first" : i === ticks ? "last" : "" }, tick(second, this.span));
      mark.style.left = `${(used * i) / ticks}px`;
      marks.push(mark);
    }
    by("axis").replaceChildren(...marks);
  }

  drawRows() {
    for (const row of this.rows ?? []) {
      const told = this.active === null ? null : row.one.passes[row.pass][this.active];
      row.canvas.replaceChildren(this.weights(row, told));
      row.said.replaceChildren(...this.said(row, told));
    }
  }

  // Height: the weight, as a share of the largest. Shade: where it stands between smallest and largest, so that small differences show too.
  weights(row, told) {
    const svg = this.canvas(ROW);
    const length = this.columnOf.length;
    const offset = length - row.one.reads;
    if (offset > 0) {
      const edge = this.columnOf[offset] * this.step;
      if (edge > 1) svg.append(draw("rect", { class: "unread", x: 0, y: 0, width: edge, height: ROW }));
      if (edge > 130) svg.append(draw("text", { class: "unread-words", x: edge / 2, y: ROW / 2 + 4 }, `${count(offset)} older events: not read`));
    }
    if (!told || !told.largest) return svg;
    const most = new Float32Array(this.columns);
    told.bytes.forEach((weight, place) => {
      const x = this.columnOf[offset + place];
      if (Math.abs(weight) > Math.abs(most[x])) most[x] = weight;
    });
    let smallest = 127;
    for (const weight of told.bytes) smallest = Math.min(smallest, Math.abs(weight));
    const paths = Array.from({ length: SHADES }, () => "");
    let negative = "";
    most.forEach((weight, x) => {
      const height = (Math.abs(weight) / 127) * (ROW - 6);
      if (height < 0.4) return;
      const shade = Math.min(SHADES - 1, Math.floor(((Math.abs(weight) - smallest) / (127.001 - smallest)) * SHADES));
      if (weight < 0) negative += this.bar(x, ROW - height, height);
      else paths[shade] += this.bar(x, ROW - height, height);
    });
    paths.forEach((path, shade) => path && svg.append(draw("path", { d: path, class: "weight", "fill-opacity": (0.22 + (0.78 * shade) / (SHADES - 1)).toFixed(2) })));
    if (negative) svg.append(draw("path", { d: negative, class: "weight negative" }));
    for (const [place] of told.strongest.slice(0, PEAKS)) {
      const x = Math.min(this.width - 4, Math.max(4, (this.columnOf[offset + place] + 0.5) * this.step));
      svg.append(draw("path", { d: `M${x - 3.5} 0h7l-3.5 5z`, class: "peak" }));
    }
    return svg;
  }

  said(row, told) {
    if (!told) return [];
    const { items, history } = this.answer;
    const offset = history.items.length - row.one.reads;
    return told.strongest.slice(0, NAMED).map(([place, weight]) => {
      const item = items[history.items[offset + place]];
      const ratio = told.mean ? times(weight / told.mean) : "";
      return make("span", { class: "behaviour" }, named(title(item)), make("b", {}, ratio));
    });
  }

  bar(x, top, height) {
    const gap = this.step > 3 ? 1 : 0;
    return `M${(x * this.step).toFixed(2)} ${top.toFixed(2)}h${(this.step - gap).toFixed(2)}v${height.toFixed(2)}h-${(this.step - gap).toFixed(2)}z`;
  }

  canvas(height) {
    return draw("svg", { width: this.width, height, viewBox: `0 0 ${this.width} ${height}`, "aria-hidden": "true" });
  }

  columnAt(event) {
    const x = event.clientX - this.strip.getBoundingClientRect().left;
    const column = Math.floor(x / this.step);
    return column >= 0 && column < this.columns ? column : null;
  }

  // Say what a column holds.
  point(column) {
    if (!this.answer) return;
    const { times: at, actions } = this.answer.history;
    const places = column === null ? [] : this.placesIn(column);
    this.cursor = places.length ? column : null;
    this.mark.setAttribute("visibility", places.length ? "visible" : "hidden");
    if (!places.length) {
      by("cursor").replaceChildren(...this.legend());
      return;
    }
    this.mark.setAttribute("x", column * this.step - (this.step > 3 ? 0.5 : 0));
    const counts = this.actions.map((name, i) => [name, this.counts[column][i + 1]]).filter(([, number]) => number);
    const [first, last] = [places[0], places[places.length - 1]];
    const item = title(this.answer.items[this.answer.history.items[first]]);
    const words = places.length === 1
      ? `${item}, ${action(this.actions[actions[first] - 1])}, ${minute(at[first])}`
      : `${many(places.length, "event")}, ${since(at[first], at[last])}: ${counts.map(([name, number]) => `${count(number)} ${action(name)}`).join(", ")}`;
    by("cursor").replaceChildren(named(words));
    this.strip.setAttribute("aria-valuenow", String(column + 1));
    this.strip.setAttribute("aria-valuetext", words);
  }

  legend() {
    return this.actions.map((name, i) => {
      const swatch = draw("svg", { width: 10, height: 10, "aria-hidden": "true" }, draw("rect", { class: "act", width: 10, height: 10, rx: 2, "fill-opacity": this.shade(i + 1) }));
      return make("span", { class: "legend" }, swatch, named(action(name)));
    });
  }

  placesIn(column) {
    const places = [];
    this.columnOf.forEach((x, place) => x === column && places.push(place));
    return places;
  }

  choose(column) {
    const places = column === null ? [] : this.placesIn(column);
    if (places.length) this.onevents(places[places.length - 1]);
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.choose(this.cursor);
    }
    if (!(event.key in steps) || !this.columnOf?.length) return;
    event.preventDefault();
    const filled = [...new Set(this.columnOf)].sort((a, b) => a - b);
    const now = this.cursor === null ? filled.length : filled.indexOf(this.cursor);
    this.point(filled[Math.max(0, Math.min(filled.length - 1, now + steps[event.key]))]);
  }
}
