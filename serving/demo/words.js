// Numbers, dates and names as people read them. Times are UTC, as in the log.

const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric", timeZone: "UTC" });
const MINUTE = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit", timeZone: "UTC" });
const CLOCK = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", timeZone: "UTC" });
const COUNT = new Intl.NumberFormat("en");

export const count = (number) => COUNT.format(number);

export const many = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

export const day = (seconds) => DAY.format(seconds * 1000);

export const minute = (seconds) => MINUTE.format(seconds * 1000);

// A tick of an axis that spans so many seconds.
export const tick = (seconds, span) => (span > 3 * 86400 ? day(seconds) : CLOCK.format(seconds * 1000));

export function since(first, last) {
  return day(first) === day(last) ? day(first) : `${day(first)} – ${day(last)}`;
}

export function ordinal(place) {
  const tens = place % 100;
  const end = tens > 10 && tens < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[place % 10] || "th";
  return `${count(place)}${end}`;
}

export const score = (value) => (value >= 0.0995 ? value.toFixed(2) : value.toFixed(3));

export const times = (ratio) => `${ratio >= 9.95 || ratio <= -9.95 ? ratio.toFixed(0) : ratio.toFixed(1)}×`;

// "rated_5" -> "rated 5": how an action is written, not what it is.
export const action = (name) => name.replaceAll("_", " ");

export const arm = (name) => name.replaceAll("_", " ");

// A row [key, title] of the answer's items.
export const title = ([key, text]) => text || key;
