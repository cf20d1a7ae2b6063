/** Depths, exit criteria and their colours. */

/** What a value is compared with; `sign` says on which side of the threshold a token stops. */
export const CRITERIA = {
  latent_diff: { threshold: 0.03, sign: "<", meaning: "the state has moved by less than this part of its length" },
  cosine: { threshold: 5e-4, sign: "<", meaning: "1 − cosine of the state and the one before is below this" },
  entropy_diff: { threshold: 1e-3, sign: "<", meaning: "the entropy of the next token has changed by less than this (nats)" },
  kl: { threshold: 5e-4, sign: "<", meaning: "KL from the distribution before is below this (nats)" },
  minp_kl: { threshold: 1e-6, sign: "<", meaning: "the same among the likely tokens is below this (nats)" },
  argmax_stability: { threshold: 5, sign: "≥", meaning: "the likeliest token has stayed the same for so many iterations" },
  entropy: { threshold: 0.1, sign: "<", meaning: "the entropy of the next token is below this (nats)" },
  top1: { threshold: 0.05, sign: "<", meaning: "all tokens but the likeliest have less than this probability" },
  margin: { threshold: 0.1, sign: "<", meaning: "the likeliest token is ahead of the second by all but this probability" },
  learned_gate: { threshold: 0.5, sign: "<", meaning: "the model's gate leaves less than this probability of going on" },
};

/** Smallest and largest threshold that can be set. */
export function bounds(name) {
  if (name === "argmax_stability") return [1, 25];
  if (["learned_gate", "top1", "margin"].includes(name)) return [0.001, 0.99];
  const { threshold } = CRITERIA[name];
  return [threshold / 1e4, Math.min(threshold * 1e4, 50)];
}

/** The threshold as it would be sent, rounded as it is shown. */
export function tidy(name, value) {
  const [low, high] = bounds(name);
  const within = Math.min(high, Math.max(low, value));
  return name === "argmax_stability" ? Math.round(within) : Number(within.toPrecision(3));
}

/** From 0 to 1 on a log scale, and back. */
export function toShare(name, value) {
  const [low, high] = bounds(name);
  return Math.log(value / low) / Math.log(high / low);
}
export function fromShare(name, share) {
  const [low, high] = bounds(name);
  return tidy(name, low * (high / low) ** share);
}

/** The iteration after which a token stops; `values` are those of one criterion. */
export function exitDepth(name, values, threshold, minDepth = 1) {
  if (name === "fixed") return values.length;
  const isSettled = (value) =>
    name === "argmax_stability" ? value !== null && value >= threshold : value !== null && value < threshold;
  for (let depth = minDepth; depth <= values.length; depth++) {
    if (isSettled(values[depth - 1])) return depth;
  }
  return values.length;
}

/** Depths of a slider: each up to 8, then four per doubling; always the trained one and the last. */
export function stops(max, trained) {
  const found = new Set([max]);
  if (trained && trained <= max) found.add(trained);
  for (let depth = 1; depth <= max; depth += Math.max(1, 2 ** Math.floor(Math.log2(depth)) / 4)) {
    found.add(depth);
  }
  return [...found].sort((a, b) => a - b);
}

// Depths that differ by less than this factor do not get the whole range of colours.
const LEAST_SPAN = Math.log(1.5);

/** Colours of depths: one direction of lightness, with enough contrast for text on it. */
export class Scale {
  constructor(low = Infinity, high = 0) {
    this.low = low;
    this.high = high;
  }

  /** Makes room for a depth; returns whether other depths change their colours by it. */
  see(depth) {
    const { low, high } = this;
    this.low = Math.min(low, depth);
    this.high = Math.max(high, depth);
    return low !== this.low || high !== this.high;
  }

  shade(depth) {
    const [low, high, place] = [this.low, this.high, depth].map(Math.log);
    const span = Math.max(high - low, LEAST_SPAN);
    const share = Math.min(1, Math.max(0, 0.5 + (place - (low + high) / 2) / span));
    const light = `oklch(${0.97 - 0.27 * share} ${0.045 + 0.095 * share} ${115 + 155 * share})`;
    const dark = `oklch(${0.29 + 0.23 * share} ${0.06 + 0.07 * share} ${285 - 130 * share})`;
    return `light-dark(${light}, ${dark})`;
  }
}
