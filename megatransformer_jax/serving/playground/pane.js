/** One text as it comes: coloured tokens, how fast, how deep, and which depths there are. */

import { drawn, element, percent } from "./api.js";

// A token that the model gave less than this was an unlikely one.
const UNLIKELY = Math.log(0.05);

export class Pane {
  /**
   * `request` is the body that is sent, `scale` that of all panes; `look` is called with the pane and
   * a token's number when it is chosen.
   */
  constructor(request, promptText, scale, look) {
    this.request = request;
    this.scale = scale;
    this.tokens = [];
    this.begun = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.look = look;
    this.title = titleOf(request);
    this.text = element("div", {
      class: "tokens",
      role: "group",
      "aria-label": `Tokens of ${this.title}; arrow keys move, Enter opens`,
      onkeydown: (event) => this.#press(event),
      onclick: (event) => this.#open(event.target.closest("[role=button]")),
    });
    this.text.append(element("span", { class: "prompt" }, promptText));
    this.meter = element("p", { class: "meter" });
    this.histogram = element("div", { class: "histogram", role: "group", "aria-label": "Depths; choose one to see its tokens" });
    this.spark = drawn("svg", { class: "spark", role: "img", "aria-label": "Iterations of each token", preserveAspectRatio: "none" });
    this.note = element("p", { class: "hint note" });
    const head = element("header", {}, element("h3", {}, this.title), this.meter, this.note);
    const foot = element("footer", {}, this.histogram, this.spark);
    this.root = element("article", { class: "pane", "aria-label": this.title }, head, this.text, foot);
    this.#measure();
  }

  get promptIds() {
    return this.request.prompt;
  }

  get depths() {
    return this.tokens.map((token) => token.depth);
  }

  get meanDepth() {
    const { depths } = this;
    return depths.length ? depths.reduce((sum, depth) => sum + depth, 0) / depths.length : 0;
  }

  /** Takes a chunk of the stream. */
  add(chunk) {
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const found = tokensOf(choice);
    for (const token of found) this.#append(token);
    if (!found.length && choice.text) this.#extend(choice.text);
    if (choice.finish_reason) this.end(choice.finish_reason);
    if (found.length) this.#measure();
  }

  /** Says why nothing more comes. */
  end(reason) {
    const words = { length: "… as long as asked for", stop: "■ the end", cancelled: "… stopped", error: "… broken off" };
    this.text.append(element("span", { class: "end" }, ` ${words[reason] ?? reason}`));
    this.#measure();
  }

  /** Marks the first token, or all tokens, that are not the other text's. */
  compareWith(ids, all) {
    const others = this.tokens.filter((token, place) => place < ids.length && token.id !== ids[place]);
    const marked = new Set(all ? others : others.slice(0, 1));
    for (const token of this.tokens) token.span.classList.toggle("differs", marked.has(token));
    const compared = Math.min(ids.length, this.tokens.length);
    if (all && compared) this.note.textContent = `${percent(1 - others.length / compared)} as the deepest`;
  }

  /** Colours all tokens by the scale. */
  paint() {
    for (const token of this.tokens) this.#paintToken(token);
    this.#drawHistogram(this.depths);
  }

  #paintToken({ span, depth }) {
    if (depth) span.style.setProperty("--shade", this.scale.shade(depth));
  }

  #append(token) {
    this.firstAt ??= performance.now();
    this.lastAt = performance.now();
    const number = this.tokens.length;
    const likely = token.logProb === null ? "" : ` · ${percent(Math.exp(token.logProb))}`;
    const span = element(
      "span",
      {
        role: "button",
        tabindex: number ? -1 : 0,
        "data-number": number,
        "data-depth": token.depth,
      },
      token.text || "\u200b",
    );
    span.classList.toggle("unlikely", token.logProb !== null && token.logProb < UNLIKELY);
    span.classList.toggle("breaks", token.text.endsWith("\n"));
    token.span = span;
    this.#paintToken(token);
    this.tokens.push(token);
    this.#label(token, likely);
    this.text.append(span);
  }

  #label(token, likely) {
    const depth = token.depth ? `${token.depth} iteration${token.depth > 1 ? "s" : ""}` : "";
    token.span.title = `“${token.text}” · ${depth}${likely}`;
    token.span.setAttribute("aria-label", `${token.text.trim() || (token.text.includes("\n") ? "line break" : "space")}, ${depth}`);
  }

  /** Text that was held back until it was known to be text. */
  #extend(text) {
    const last = this.tokens.at(-1);
    if (!last) this.text.append(text);
    else last.span.textContent = (last.text += text);
  }

  // ---------------------------------------------------------------------------
  // Speed and depth.

  #measure() {
    const { depths } = this;
    const asked = this.request.depth;
    const seconds = this.lastAt === null ? 0 : (this.lastAt - this.firstAt) / 1000;
    const speed = seconds > 0 ? (depths.length - 1) / seconds : 0;
    const parts = [
      [speed ? speed.toFixed(speed < 10 ? 1 : 0) : "–", " tokens/s"],
      [this.firstAt === null ? "–" : `${((this.firstAt - this.begun) / 1000).toFixed(2)} s`, " to the first"],
    ];
    if (asked) {
      parts.push([depths.length ? this.meanDepth.toFixed(1) : "–", " iterations/token"]);
      parts.push([depths.length ? percent(Math.max(0, 1 - this.meanDepth / asked)) : "–", " saved"]);
    }
    this.meter.replaceChildren(
      ...parts.map(([value, unit]) => element("span", {}, element("b", {}, value), unit)),
    );
    this.#drawHistogram(depths);
    this.#drawSpark(depths, asked);
  }

  #drawHistogram(depths) {
    const counts = new Map();
    for (const depth of depths.filter(Boolean)) counts.set(depth, (counts.get(depth) ?? 0) + 1);
    const most = Math.max(1, ...counts.values());
    const bars = [...counts].sort(([a], [b]) => a - b).map(([depth, count]) => {
      const height = `${4 + Math.round((28 * count) / most)}px`;
      const bar = element("i", { "--shade": this.scale.shade(depth) });
      bar.style.height = height;
      return element(
        "button",
        {
          type: "button",
          "aria-pressed": this.filter === depth,
          "aria-label": `${count} tokens took ${depth} iterations`,
          title: `${count} tokens took ${depth} iterations`,
          onclick: () => this.#choose(depth),
        },
        bar,
        String(depth),
      );
    });
    this.histogram.replaceChildren(...bars);
  }

  #choose(depth) {
    this.filter = this.filter === depth ? null : depth;
    for (const token of this.tokens) {
      token.span.classList.toggle("dimmed", this.filter !== null && token.depth !== this.filter);
    }
    this.#drawHistogram(this.depths);
    [...this.histogram.children].find((bar) => bar.getAttribute("aria-pressed") === "true")?.focus();
  }

  #drawSpark(depths, asked) {
    if (!depths.length || !asked) return;
    this.spark.setAttribute("viewBox", `0 0 ${Math.max(depths.length, 24)} ${asked}`);
    const path = depths.map((depth, place) => `M${place + 0.5} ${asked}V${asked - depth}`).join("");
    this.spark.replaceChildren(drawn("path", { d: path, stroke: "currentColor", "stroke-width": 0.8, opacity: 0.7 }));
  }

  // ---------------------------------------------------------------------------
  // One stop for the Tab key; the arrow keys move from token to token.

  #press(event) {
    const number = Number(event.target.dataset.number);
    if (Number.isNaN(number)) return;
    const moves = { ArrowRight: number + 1, ArrowLeft: number - 1, Home: 0, End: this.tokens.length - 1 };
    if (event.key in moves) {
      const next = this.tokens[Math.max(0, Math.min(this.tokens.length - 1, moves[event.key]))];
      event.preventDefault();
      event.target.tabIndex = -1;
      next.span.tabIndex = 0;
      next.span.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#open(event.target);
    }
  }

  #open(span) {
    if (span) this.look(this, Number(span.dataset.number));
  }
}

function titleOf({ depth, exit_criterion: criterion, exit_threshold: threshold }) {
  if (depth === undefined) return "no core";
  if (!criterion) return `depth ${depth}`;
  const sign = criterion === "argmax_stability" ? "≥" : "<";
  return `depth ≤ ${depth}, ${criterion} ${sign} ${threshold}`;
}

/** The tokens of a choice; usually one. */
function tokensOf(choice) {
  const ids = choice.token_ids ?? [];
  const scores = choice.logprobs;
  return ids.map((id, place) => ({
    id,
    text: ids.length === 1 ? (choice.text ?? "") : (scores?.tokens?.[place] ?? ""),
    depth: choice.depths?.[place] || null, // 0 without a core.,
    logProb: scores?.token_logprobs?.[place] ?? null,
  }));
}
