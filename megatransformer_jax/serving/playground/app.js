/** The playground: what is asked, the texts that come, and a look into their tokens. */

import { byId, drawn, element, get, post, setKey, short, stream } from "./api.js";
import { CRITERIA, Scale, fromShare, stops, tidy, toShare } from "./depths.js";
import { Lens } from "./lens.js";
import { Pane } from "./pane.js";

const SIDES = ["a", "b"];
const POLL_MS = 500;
const SAMPLES = 120; // Of a row's state: a minute.
const MAX_ROWS = 64;

const page = {
  model: null,
  depths: [],
  panes: [],
  scale: new Scale(), // Of the panes.
  running: null, // An AbortController.
  looked: 0, // So that an answer to an earlier click is not shown after a later one's.
  requests: new Set(),
};

const form = byId("controls");
const chosen = (name) => form.elements[name].value;

// -----------------------------------------------------------------------------
// The server and its model.

async function connect() {
  try {
    const health = await fetch("health", { cache: "no-store" });
    const { status } = await health.json();
    if (health.status === 503 && status === "loading") {
      showModel("loading", "The server is loading its model …");
      setTimeout(connect, 1000);
      return;
    }
    const models = await get("v1/models");
    byId("problem").hidden = true;
    setUp(models.data[0]);
  } catch (error) {
    byId("key-row").hidden = error.status !== 401;
    showModel("failed", "Not connected");
    showProblem(error.status === 401 ? "This server asks for an API key." : `The server cannot be used: ${error.message}`);
  }
}

function showModel(state, ...parts) {
  byId("model").dataset.state = state;
  byId("model").replaceChildren(...parts);
}

function showProblem(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = !message;
}

function setUp(card) {
  const meta = card.meta ?? {};
  const isNew = page.model === null;
  page.model = { name: card.id, ...meta };
  const facts = [];
  if (meta.parameters) facts.push(`${(meta.parameters / 1e6).toPrecision(3)} M parameters`);
  if (meta.trained_depth) facts.push(`trained at ${meta.trained_depth} iterations`);
  showModel("ready", element("b", {}, card.id), ` ${facts.join(" · ")}`);
  byId("run").disabled = page.running !== null;
  if (!isNew) return;
  const hasCore = Boolean(meta.trained_depth);
  page.depths = hasCore ? stops(meta.max_depth ?? 4 * meta.trained_depth, meta.trained_depth) : [1];
  for (const side of SIDES) setUpSide(side, meta);
  const marks = hasCore ? [element("option", { value: page.depths.indexOf(meta.trained_depth) })] : [];
  byId("depth-marks").replaceChildren(...marks);
  byId("trained").textContent = hasCore ? `The mark is the mean in training, ${meta.trained_depth}.` : "";
  if (!hasCore) {
    form.querySelector('[data-side="a"]').hidden = true;
    for (const mode of ["compare", "strip"]) form.querySelector(`[value=${mode}]`).disabled = true;
  }
  if (card.max_model_len) byId("tokens").max = card.max_model_len - 1;
  readLink();
  showSettings();
  const shades = new Scale(1, 8);
  byId("scale").replaceChildren(...[1, 1.35, 1.8, 2.4, 3.3, 4.4, 6, 8].map((depth) => element("i", { "--shade": shades.shade(depth) })));
}

function setUpSide(side, { criteria = [], trained_depth: trained = 1 }) {
  const depth = byId(`depth-${side}`);
  depth.max = page.depths.length - 1;
  setDepth(side, side === "a" ? trained : Math.max(1, Math.round(trained / 2)));
  const labels = { fixed: "nothing: all take this depth" };
  const options = criteria.length ? criteria : ["fixed"];
  byId(`criterion-${side}`).replaceChildren(
    ...options.map((name) => element("option", { value: name }, labels[name] ?? name)),
  );
  byId(`criterion-${side}`).value = options.includes("latent_diff") && side === "a" ? "latent_diff" : "fixed";
  setThreshold(side, null);
}

// -----------------------------------------------------------------------------
// What is asked.

const depthOf = (side) => page.depths[Number(byId(`depth-${side}`).value)];
const criterionOf = (side) => byId(`criterion-${side}`).value;
/** What was set, until the slider is moved. */
function thresholdOf(side) {
  const { value, dataset } = byId(`threshold-${side}`);
  return dataset.exact ? Number(dataset.exact) : fromShare(criterionOf(side), Number(value) / 1000);
}

/** The nearest depth that the slider has. */
function setDepth(side, depth) {
  const distance = (other) => Math.abs(Math.log(other / depth));
  const nearest = page.depths.reduce((best, other) => (distance(other) < distance(best) ? other : best));
  byId(`depth-${side}`).value = page.depths.indexOf(nearest);
}

/** `null`: the criterion's default. */
function setThreshold(side, threshold) {
  const name = criterionOf(side);
  if (!(name in CRITERIA)) return;
  const slider = byId(`threshold-${side}`);
  slider.dataset.exact = tidy(name, threshold ?? CRITERIA[name].threshold);
  slider.value = Math.round(1000 * toShare(name, Number(slider.dataset.exact)));
}

function showSettings() {
  const mode = chosen("mode");
  form.querySelector('[data-side="b"]').hidden = mode !== "compare";
  form.querySelector('[data-side="a"]').hidden = mode === "strip" || !page.model?.trained_depth;
  byId("temperature-shown").textContent = mode === "strip" ? "0" : Number(byId("temperature").value).toFixed(2);
  byId("temperature").disabled = mode === "strip"; // Depths are compared by their likeliest tokens.
  for (const side of SIDES) {
    const depth = depthOf(side);
    const name = criterionOf(side);
    byId(`depth-${side}-shown`).textContent = depth;
    byId(`depth-${side}`).setAttribute("aria-valuetext", `${depth} iterations`);
    const block = form.querySelector(`[data-side=${side}] .threshold`);
    block.hidden = !(name in CRITERIA);
    if (block.hidden) continue;
    const shown = `${CRITERIA[name].sign} ${short(thresholdOf(side))}`;
    byId(`threshold-${side}-shown`).textContent = shown;
    byId(`threshold-${side}`).setAttribute("aria-valuetext", shown);
    byId(`meaning-${side}`).textContent = `A token stops once ${CRITERIA[name].meaning}.`;
  }
}

function bodyFor(depth, side, prompt, isGreedy) {
  const body = {
    model: page.model.name,
    prompt,
    max_tokens: Number(byId("tokens").value),
    temperature: isGreedy ? 0 : Number(byId("temperature").value),
    seed: Number(byId("seed").value),
    stream: true,
    logprobs: 0,
    return_token_ids: true,
    return_depths: true,
  };
  if (!page.model.trained_depth) return body;
  body.depth = depth;
  const criterion = side ? criterionOf(side) : "fixed";
  if (criterion in CRITERIA) {
    body.exit_criterion = criterion;
    body.exit_threshold = thresholdOf(side);
  }
  return body;
}

/** The bodies of all texts that the mode shows. */
function bodies(prompt) {
  const mode = chosen("mode");
  if (mode === "strip") {
    const last = page.depths.at(-1);
    const depths = new Set([last]);
    for (let depth = 1; depth < last; depth *= 2) depths.add(depth);
    return [...depths].sort((a, b) => a - b).map((depth) => bodyFor(depth, null, prompt, true));
  }
  const sides = mode === "compare" ? SIDES : ["a"];
  return sides.map((side) => bodyFor(depthOf(side), side, prompt, false));
}

// -----------------------------------------------------------------------------
// Texts.

async function run() {
  if (page.running || !page.model) return;
  const controller = new AbortController();
  page.running = controller;
  setRunning(true);
  showProblem("");
  writeLink();
  lens.hide();
  const started = performance.now();
  try {
    const text = byId("prompt").value;
    const { tokens } = await post("tokenize", { prompt: text });
    page.scale = new Scale();
    page.panes = bodies(tokens).map((body) => new Pane(body, text, page.scale, look));
    byId("panes").replaceChildren(...page.panes.map((pane) => pane.root));
    byId("panes").className = { compare: "side", strip: "strip" }[chosen("mode")] ?? "";
    const ends = await Promise.allSettled(page.panes.map((pane) => follow(pane, controller.signal)));
    const failed = ends.find((end) => end.status === "rejected");
    if (failed) throw failed.reason;
    byId("status").textContent = summary(started);
  } catch (error) {
    if (error.status === 401) byId("key-row").hidden = false;
    byId("status").textContent = "";
    showProblem(error.message);
  } finally {
    page.running = null;
    setRunning(false);
  }
}

function setRunning(isRunning) {
  byId("run").disabled = isRunning;
  byId("stop").disabled = !isRunning;
  byId("results").setAttribute("aria-busy", isRunning);
  if (isRunning) byId("status").textContent = "Generating …";
}

async function follow(pane, signal) {
  const requestId = `playground-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
  page.requests.add(requestId);
  try {
    for await (const chunk of stream("v1/completions", pane.request, { signal, requestId })) {
      pane.add(chunk);
      showTogether(chunk);
    }
  } catch (error) {
    pane.end(error.name === "AbortError" ? "cancelled" : "error");
    if (error.name !== "AbortError") throw error;
  } finally {
    page.requests.delete(requestId);
  }
}

/** Colours that all texts share, and differences. */
function showTogether(chunk) {
  const depths = chunk.choices?.[0]?.depths ?? [];
  const changes = depths.filter(Boolean).map((depth) => page.scale.see(depth));
  if (changes.includes(true)) for (const pane of page.panes) pane.paint();
  // Two texts: where they part. A strip: every token that is not the deepest text's.
  if (page.panes.length < 2) return;
  const ids = page.panes.map((pane) => pane.tokens.map((token) => token.id));
  if (byId("panes").className === "strip") {
    page.panes.forEach((pane) => pane.compareWith(ids.at(-1), true));
  } else {
    page.panes[0].compareWith(ids[1], false);
    page.panes[1].compareWith(ids[0], false);
  }
}

function summary(started) {
  const count = page.panes.reduce((sum, pane) => sum + pane.tokens.length, 0);
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  const depths = page.panes.map((pane) => pane.meanDepth.toFixed(1)).join(" and ");
  const isOne = page.panes.length < 3 && page.model.trained_depth;
  return `${count} tokens in ${seconds} s${isOne ? `, ${depths} iterations per token` : ""}.`;
}

// -----------------------------------------------------------------------------
// One token.

async function look(pane, number) {
  if (!page.model.trained_depth) return;
  const token = pane.tokens[number];
  const { request } = pane;
  const looked = ++page.looked;
  for (const other of document.querySelectorAll(".tokens .chosen")) other.classList.remove("chosen");
  token.span.classList.add("chosen");
  const ids = [...pane.promptIds, ...pane.tokens.map((each) => each.id)];
  const body = {
    ids: ids.slice(0, pane.promptIds.length + number + 1),
    position: pane.promptIds.length + number - 1,
    prompt_tokens: pane.promptIds.length,
    seed: request.seed,
    depth: request.depth,
    exit_criterion: request.exit_criterion,
    exit_threshold: request.exit_threshold,
  };
  try {
    const answer = await post("lens", body);
    if (looked !== page.looked) return;
    const rule = { criterion: request.exit_criterion, threshold: request.exit_threshold };
    lens.show(answer, { ...rule, tookDepth: token.depth });
  } catch (error) {
    if (looked === page.looked) showProblem(error.message);
  }
}

const lens = new Lens((criterion, threshold) => {
  byId("criterion-a").value = criterion;
  setThreshold("a", threshold);
  showSettings();
  byId("threshold-a").focus();
});

// -----------------------------------------------------------------------------
// Rows of the server.

const rows = new Map();

async function poll() {
  if (!byId("server").open || document.hidden) return;
  try {
    const { data } = await get("slots");
    const shown = data.slice(0, MAX_ROWS);
    for (const slot of shown) showRow(slot);
  } catch {
    // The next one may succeed; what is asked for besides says what is wrong.
  }
}

function showRow(slot) {
  if (!rows.has(slot.row)) {
    const strip = drawn("svg", { viewBox: `0 0 ${SAMPLES} 18`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const cells = Array.from({ length: 4 }, () => element("td"));
    const line = element("tr", {}, ...cells, element("td", {}, strip));
    byId("lanes").tBodies[0].append(line);
    rows.set(slot.row, { line, cells, strip, samples: [] });
  }
  const row = rows.get(slot.row);
  const isFree = slot.state === "free";
  const values = [
    String(slot.row),
    slot.state,
    isFree || slot.state === "reading" ? "" : `${slot.iteration || slot.last_depth || "–"} of ${slot.depth}`,
    isFree ? "" : slot.state === "reading" ? `${slot.read_tokens} of ${slot.prompt_tokens}` : String(slot.tokens),
  ];
  row.cells.forEach((cell, place) => (cell.textContent = values[place]));
  row.line.classList.toggle("mine", page.requests.has(slot.request));
  row.samples.push(slot);
  row.samples.splice(0, row.samples.length - SAMPLES);
  row.strip.replaceChildren(...stripOf(row.samples));
}

function stripOf(samples) {
  const scale = new Scale(1, page.depths.at(-1));
  const runs = [];
  samples.forEach((slot, place) => {
    const colour = slot.state === "running" ? scale.shade(slot.depth) : slot.state;
    const last = runs.at(-1);
    if (last?.colour === colour && last.request === slot.request) last.width++;
    else runs.push({ colour, request: slot.request, start: place, width: 1 });
  });
  const offset = SAMPLES - samples.length;
  return runs.map(({ colour, start, width }) => {
    const isState = ["free", "reading"].includes(colour);
    const rect = drawn("rect", { x: offset + start, y: 2, width: width - 0.15, height: 14, class: isState ? colour : null });
    if (!isState) rect.style.fill = colour;
    return rect;
  });
}

// -----------------------------------------------------------------------------
// A link that has all settings.

function settings() {
  const found = { p: byId("prompt").value, m: chosen("mode"), t: byId("temperature").value, s: byId("seed").value, n: byId("tokens").value };
  for (const side of SIDES) {
    found[`d${side}`] = depthOf(side);
    found[`c${side}`] = criterionOf(side);
    if (criterionOf(side) in CRITERIA) found[`x${side}`] = thresholdOf(side);
  }
  return new URLSearchParams(found).toString();
}

function writeLink() {
  history.replaceState(null, "", `#${settings()}`);
}

function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  const put = (id, name) => {
    if (given.has(name)) byId(id).value = given.get(name);
  };
  put("prompt", "p");
  put("temperature", "t");
  put("seed", "s");
  put("tokens", "n");
  const mode = [...form.elements.mode].find((radio) => radio.value === given.get("m") && !radio.disabled);
  if (mode) mode.checked = true;
  for (const side of SIDES) {
    const depth = Number(given.get(`d${side}`));
    if (depth >= 1) setDepth(side, depth);
    const criterion = given.get(`c${side}`);
    const options = [...byId(`criterion-${side}`).options].map((option) => option.value);
    if (options.includes(criterion)) byId(`criterion-${side}`).value = criterion;
    const threshold = Number(given.get(`x${side}`));
    setThreshold(side, threshold > 0 ? threshold : null);
  }
}

// -----------------------------------------------------------------------------
// Buttons and keys.

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  byId("theme").setAttribute("aria-label", `Theme: ${theme}; changes it`);
  localStorage.setItem("theme", theme);
}

function listen() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("stop").addEventListener("click", () => page.running?.abort());
  form.addEventListener("input", (event) => {
    delete event.target.dataset.exact;
    showSettings();
  });
  for (const side of SIDES) {
    byId(`criterion-${side}`).addEventListener("change", () => {
      setThreshold(side, null);
      showSettings();
    });
  }
  byId("key").addEventListener("change", () => {
    setKey(byId("key").value);
    connect();
  });
  byId("numbers").addEventListener("change", (event) => byId("results").classList.toggle("numbered", event.target.checked));
  byId("link").addEventListener("click", async () => {
    writeLink();
    try {
      await navigator.clipboard.writeText(location.href);
      byId("status").textContent = "The link is in the clipboard.";
    } catch {
      byId("status").textContent = "The link is in the address bar.";
    }
  });
  byId("theme").addEventListener("click", () => {
    const now = localStorage.getItem("theme") ?? "system";
    setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
    if (event.key === "Escape") page.running?.abort();
  });
  byId("server").addEventListener("toggle", poll);
}

setTheme(THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system");
listen();
connect();
setInterval(poll, POLL_MS);
