/** How one token came about: what was likely after each iteration, and when it would have stopped. */

import { byId, drawn, element, percent, short, visible } from "./api.js";
import { CRITERIA, bounds, exitDepth, tidy } from "./depths.js";

// Width of the row labels with their gaps, and of a column, whose gap is between two of them.
const LEFT = 64;
const GAP = 2;
const COLUMN = { least: 64, most: 124 };
const HEIGHT = 210;
const TOP = 14;
const BOTTOM = 26;

export class Lens {
  /** `use` is called with a criterion and a threshold that the user wants to take over. */
  constructor(use) {
    this.section = byId("lens");
    byId("lens-use").addEventListener("click", () => use(this.criterion, this.threshold));
  }

  hide() {
    this.section.hidden = true;
  }

  /** Shows an answer of /lens; `rule` is what the token was generated with. */
  show(answer, rule) {
    const names = Object.keys(answer.values);
    const hasRule = names.includes(rule.criterion);
    this.answer = answer;
    this.depth = answer.depth;
    this.criterion = hasRule ? rule.criterion : names[0];
    this.threshold = hasRule ? rule.threshold : CRITERIA[this.criterion].threshold;
    this.tookDepth = rule.tookDepth;
    this.section.hidden = false;
    const room = Math.floor((this.section.querySelector(".lens-scroll").clientWidth - LEFT - GAP) / this.depth);
    this.column = Math.min(COLUMN.most, Math.max(COLUMN.least, room));
    this.#drawTable();
    this.#drawChips(names);
    this.#drawChart();
    this.#mark();
  }

  #drawTable() {
    const { answer } = this;
    const target = answer.next?.id;
    const numbers = answer.top.map((_, place) => element("th", { scope: "col", "data-at": place + 1 }, String(place + 1)));
    const head = element("tr", {}, element("th", { scope: "row" }, "iteration"), ...numbers);
    const rows = answer.top[0].map((_, rank) => {
      const cells = answer.top.map((top, place) => {
        const { id, text, log_prob: logProb } = top[rank];
        const share = Math.exp(logProb ?? -100);
        return element(
          "td",
          {
            class: id === target ? "target" : null,
            "data-at": place + 1,
            "--share": `${Math.round(85 * Math.sqrt(share))}%`,
            title: `“${text}” after ${place + 1}: ${percent(share)}`,
          },
          visible(text),
        );
      });
      return element("tr", {}, element("th", { scope: "row" }, `${rank + 1}.`), ...cells);
    });
    const caption = element("caption", { class: "unseen" }, "Likeliest next tokens after each iteration");
    byId("lens-table").replaceChildren(caption, element("thead", {}, head), element("tbody", {}, ...rows));
    byId("lens-table").style.width = `${this.#width}px`;
    byId("lens-table").style.setProperty("--column", `${this.column - GAP}px`);
  }

  #drawChips(names) {
    const chips = names.map((name) =>
      element("button", { type: "button", role: "radio", "data-name": name, onclick: () => this.#choose(name) }, name),
    );
    byId("lens-criteria").replaceChildren(...chips);
    byId("lens-criteria").onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const place = (names.indexOf(this.criterion) + step + names.length) % names.length;
      this.#choose(names[place]);
      chips[place].focus();
    };
  }

  #choose(name) {
    this.criterion = name;
    this.threshold = CRITERIA[name].threshold;
    this.#drawChart();
    this.#mark();
  }

  // ---------------------------------------------------------------------------
  // The chart.

  #drawChart() {
    const values = this.answer.values[this.criterion].filter((value) => value > 0);
    const low = Math.min(...values, this.threshold) / 2;
    const high = Math.max(...values, this.threshold) * 2;
    this.range = [Math.log10(low), Math.log10(high)];
    const width = this.#width;
    const clip = drawn("clipPath", { id: "plot" }, drawn("rect", { x: LEFT, y: 0, width, height: HEIGHT - BOTTOM + 6 }));
    const others = Object.keys(this.answer.values).filter((name) => name !== this.criterion);
    const curves = [...others, this.criterion].map((name) =>
      drawn("polyline", {
        class: name === this.criterion ? "curve chosen" : "curve",
        points: this.answer.values[name].map((value, place) => `${this.#x(place + 1)},${this.#y(value)}`).join(" "),
      }, drawn("title", {}, name)),
    );
    const points = this.answer.values[this.criterion].map((value, place) =>
      drawn(
        "circle",
        { cx: this.#x(place + 1), cy: this.#y(value), r: 4, "data-at": place + 1 },
        drawn("title", {}, `${this.criterion} after ${place + 1}: ${short(value)}`),
      ),
    );
    this.exitLine = drawn("line", { class: "exit-line", y1: TOP, y2: HEIGHT - BOTTOM });
    this.handle = this.#drawHandle(width);
    const label = `${this.criterion} after each of ${this.depth} iterations, log scale`;
    const chart = drawn(
      "svg",
      { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "group", "aria-label": label },
      drawn("defs", {}, clip),
      ...this.#drawGrid(width),
      this.exitLine,
      drawn("g", { "clip-path": "url(#plot)" }, ...curves),
      ...points,
      this.handle,
    );
    byId("lens-chart").replaceChildren(chart);
    this.chart = chart;
  }

  #drawGrid(width) {
    const [low, high] = this.range;
    const step = Math.max(1, Math.ceil((high - low) / 5));
    const lines = [];
    for (let power = Math.ceil(low); power <= high; power += step) {
      const y = this.#y(10 ** power);
      lines.push(drawn("line", { class: "grid", x1: LEFT, x2: width, y1: y, y2: y }));
      lines.push(drawn("text", { x: LEFT - 8, y: y + 3, "text-anchor": "end" }, short(10 ** power)));
    }
    return lines;
  }

  #drawHandle(width) {
    const ends = { x1: LEFT, x2: width };
    const [low, high] = bounds(this.criterion);
    const handle = drawn(
      "g",
      {
        class: "threshold",
        role: "slider",
        tabindex: 0,
        "aria-label": `Threshold of ${this.criterion}`,
        "aria-orientation": "vertical",
        "aria-valuemin": low,
        "aria-valuemax": high,
        onkeydown: (event) => this.#press(event),
        onpointerdown: (event) => this.#grab(event),
      },
      drawn("line", { class: "area", ...ends }),
      drawn("line", ends),
      drawn("circle", { class: "grip", cx: LEFT + 5, r: 6 }),
      drawn("text", { x: LEFT + 16, y: -7 }),
    );
    return handle;
  }

  #grab(event) {
    event.preventDefault();
    this.handle.setPointerCapture(event.pointerId);
    const move = (moved) => {
      const y = moved.clientY - this.chart.getBoundingClientRect().top;
      const [low, high] = this.range;
      const share = (HEIGHT - BOTTOM - y) / (HEIGHT - BOTTOM - TOP);
      this.#set(10 ** (low + Math.min(1, Math.max(0, share)) * (high - low)));
    };
    const end = () => {
      this.handle.removeEventListener("pointermove", move);
      this.handle.removeEventListener("pointerup", end);
      this.handle.removeEventListener("pointercancel", end);
    };
    this.handle.addEventListener("pointermove", move);
    this.handle.addEventListener("pointerup", end);
    this.handle.addEventListener("pointercancel", end);
    this.handle.focus();
  }

  #press(event) {
    const isCount = this.criterion === "argmax_stability";
    const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5 };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    this.#set(isCount ? this.threshold + step : this.threshold * 1.15 ** step);
    const [low, high] = this.range;
    const place = Math.log10(this.threshold);
    if (place < low || place > high) {
      this.#drawChart();
      this.#mark();
      this.handle.focus();
    }
  }

  #set(threshold) {
    this.threshold = tidy(this.criterion, threshold);
    this.#mark();
  }

  // ---------------------------------------------------------------------------
  // What the threshold decides.

  #mark() {
    const { criterion, threshold, depth, answer } = this;
    const exit = exitDepth(criterion, answer.values[criterion], threshold);
    for (const cell of this.section.querySelectorAll("[data-at]")) {
      const at = Number(cell.getAttribute("data-at"));
      cell.classList.toggle("exit", at === exit && cell.tagName !== "TD");
      cell.classList.toggle("after", at > exit && cell.tagName !== "circle");
    }
    const y = this.#y(threshold);
    this.handle.setAttribute("transform", `translate(0 ${y})`);
    this.handle.setAttribute("aria-valuenow", threshold);
    this.handle.setAttribute("aria-valuetext", `${short(threshold)}, stops after ${exit} of ${depth} iterations`);
    this.handle.querySelector("text").textContent = `${CRITERIA[criterion].sign} ${short(threshold)}`;
    this.exitLine.setAttribute("x1", this.#x(exit));
    this.exitLine.setAttribute("x2", this.#x(exit));
    for (const chip of byId("lens-criteria").children) {
      const isChosen = chip.dataset.name === criterion;
      chip.setAttribute("aria-checked", isChosen);
      chip.tabIndex = isChosen ? 0 : -1;
    }
    this.#summarise(exit);
  }

  #summarise(exit) {
    const { answer, depth, criterion, threshold } = this;
    const parts = [];
    if (answer.next) {
      const first = answer.top.findLastIndex((top) => top[0].id !== answer.next.id) + 1;
      parts.push(element("q", {}, visible(answer.next.text)));
      const isLikeliest = first < depth;
      const when = first === 0 ? "from the start" : `from iteration ${first + 1} on`;
      parts.push(isLikeliest ? ` was the likeliest ${when}` : " was not the likeliest in the end");
      parts.push(` and has ${percent(Math.exp(answer.next.log_probs[depth - 1] ?? -100))} after ${depth}. `);
    }
    if (this.tookDepth) parts.push(`It took ${this.tookDepth} of ${depth} iterations. `);
    const sign = CRITERIA[criterion].sign;
    parts.push(`By ${criterion} ${sign} ${short(threshold)} it stops after ${exit}.`);
    byId("lens-summary").replaceChildren(...parts);
  }

  get #width() {
    return LEFT + this.column * this.depth + GAP;
  }

  #x(iteration) {
    return LEFT + this.column * (iteration - 0.5);
  }

  /** Infinite values lie at the top, zeros at the bottom; curves that leave the plot are cut. */
  #y(value) {
    const bottom = HEIGHT - BOTTOM;
    if (value === null) return TOP;
    if (value === 0) return bottom;
    const [low, high] = this.range;
    const share = (Math.log10(value) - low) / (high - low);
    return Math.min(bottom + 60, Math.max(TOP - 60, bottom - share * (bottom - TOP)));
  }
}
