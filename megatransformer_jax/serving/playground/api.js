/** Requests to the server that this page is from, and elements of the page. */

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let key = "";

export function setKey(value) {
  key = value.trim();
}

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let body;
  if (options.body !== undefined) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(options.body);
  }
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(path, { method, headers, body, signal: options.signal, cache: "no-store" });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let error = {};
  try {
    const answer = await response.json();
    error = answer.error ?? { message: answer.status };
  } catch {
    // Not JSON, so not from this server; the status has to do.
  }
  return new ApiError(error.message ?? `HTTP ${response.status}`, response.status, error.code);
}

export const get = async (path) => (await send(path)).json();
export const post = async (path, body) => (await send(path, { body })).json();

/** The objects of a stream of server-sent events, up to [DONE]. */
export async function* stream(path, body, { signal, requestId }) {
  const response = await send(path, { body, signal, headers: { "x-request-id": requestId } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isWhole = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done && isWhole) return;
    if (done) throw new ApiError("the connection ended before the text did", 0, "cut");
    const events = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      if (!lines.length) continue; // A comment that keeps the connection open.
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      isWhole ||= data === "[DONE]";
      if (isWhole) continue; // The connection ends by itself.
      const found = JSON.parse(data);
      if (found.error) throw new ApiError(found.error.message, 200, found.error.code);
      yield found;
    }
  }
}

// -----------------------------------------------------------------------------
// Elements. Text goes in as text, so nothing that a model writes becomes markup.

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const element = (name, attributes = {}, ...children) =>
  fill(document.createElement(name), attributes, children);

export const drawn = (name, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

export const byId = (id) => document.getElementById(id);

/** A token as people can see it. */
export const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

/** A number with three digits that count, for thresholds and values. */
export function short(value) {
  if (value === null) return "∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e4 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

/** One digit behind the point near 0 and 1, but not for these two. */
export function percent(share) {
  const isNearEnd = (share > 0 && share < 0.095) || (share > 0.995 && share < 1);
  return `${(100 * share).toFixed(isNearEnd ? 1 : 0)} %`;
}
