// What the page asks of the service. Every fault becomes a Trouble, with words for people.

const WAIT = 15_000;
const DATA = new URL("api/", document.baseURI);
const EVENTS = new URL("../events", document.baseURI);

let token = null; // of this tab, never stored

export function useToken(text) {
  token = text || null;
}

export class Trouble extends Error {
  constructor(message, { status = 0, wait = null } = {}) {
    super(message);
    this.status = status;
    this.wait = wait; // seconds after which to ask again
  }
}

async function ask(address, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const limit = AbortSignal.timeout(WAIT);
  let response;
  try {
    response = await fetch(address, {
      method: body ? "POST" : "GET",
      body: body && JSON.stringify(body),
      headers,
      signal: signal ? AbortSignal.any([signal, limit]) : limit,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Trouble(limit.aborted ? "The service took too long to answer." : "The service does not answer.");
  }
  const content = await response.json().catch(() => null);
  if (response.ok && content) return content;
  const wait = Number(response.headers.get("Retry-After")) || null;
  throw new Trouble(words(response.status, content), { status: response.status, wait });
}

function words(status, content) {
  if (status === 401) return "The service wants a token.";
  if (status === 403) return "This token may not do that.";
  if (status === 429 || status === 503) return "The service is busy or not ready.";
  if (typeof content?.error === "string") return `The service refused: ${content.error}`;
  return `The service answered ${status}.`;
}

export const setup = () => ask(new URL("setup", DATA));

export const users = (starts, signal) => ask(new URL("users", DATA), { starts }, signal);

export const explain = (user, arms, k, signal) => ask(new URL("explain", DATA), { user_id: user, arms, k }, signal);

// `id` makes it safe to send the same pick again.
export async function pick(user, item, action, id) {
  const answer = await ask(EVENTS, { events: [{ user_id: user, item_id: item, action, event_id: id }] });
  if (!(answer.accepted + answer.duplicates > 0)) {
    throw new Trouble(`The service rejected the event: ${answer.rejected?.[0]?.message || answer.rejections?.[0]?.message || "no reason given"}`, { status: 400 });
  }
  return answer;
}

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
