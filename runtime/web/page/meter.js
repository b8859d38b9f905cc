// Where the time goes, over the last few seconds.

export const STAGES = ["capture", "track", "up", "wait", "render", "down", "show"];
const SPAN_MS = 5000;

export class Meter {
  #shown = [];  // {at, total, stages}
  #exchanges = [];  // {at, rtt, offset}: how far the server's clock is ahead, and how surely
  #tracked = [];  // {at, spent}

  tracked(spent) {
    this.#tracked = recent([...this.#tracked, { at: performance.now(), spent }]);
  }

  /** A picture is on the screen. sent: of Camera; picture: of wire.js; all in ms. */
  shown(sent, picture, arrivedMs, shownMs) {
    const spentThere = picture.sentMs - picture.receivedMs;
    const rtt = Math.max(0, arrivedMs - sent.sentMs - spentThere);
    const offset = picture.receivedMs - sent.sentMs - rtt / 2;
    this.#exchanges = recent([...this.#exchanges, { at: shownMs, rtt, offset }]);
    const sure = this.#exchanges.reduce((best, one) => (one.rtt < best.rtt ? one : best));
    const up = clamp(picture.receivedMs - sent.sentMs - sure.offset, 0, rtt);
    const stages = {
      capture: Math.max(0, sent.seenMs - sent.capturedMs),
      track: sent.sentMs - sent.seenMs + picture.trackMs,
      up,
      wait: picture.waitMs,
      render: picture.renderMs,
      down: rtt - up,
      show: shownMs - arrivedMs,
    };
    const total = STAGES.reduce((sum, stage) => sum + stages[stage], 0);
    this.#shown = recent([...this.#shown, { at: shownMs, total, stages }]);
  }

  forget() {
    this.#shown = [];
    this.#exchanges = [];
    this.#tracked = [];
  }

  /** Pictures a second, p50 and p95 ms of the whole and of every stage; null before the first. */
  report() {
    this.#shown = recent(this.#shown);
    if (this.#shown.length < 2) return null;
    const stages = STAGES.map((stage) => {
      const values = this.#shown.map((one) => one.stages[stage]);
      return { stage, p50: percentile(values, 0.5), p95: percentile(values, 0.95) };
    });
    const totals = this.#shown.map((one) => one.total);
    return {
      fps: rate(this.#shown),
      p50: percentile(totals, 0.5),
      p95: percentile(totals, 0.95),
      stages,
    };
  }

  /** Faces this browser tracks a second; null before it has tracked for a while. */
  trackingRate() {
    this.#tracked = recent(this.#tracked);
    return this.#tracked.length < 2 ? null : rate(this.#tracked);
  }
}

function recent(entries) {
  const oldest = performance.now() - SPAN_MS;
  return entries.filter((entry) => entry.at >= oldest);
}

function rate(entries) {
  return ((entries.length - 1) * 1000) / Math.max(1, entries.at(-1).at - entries[0].at);
}

function percentile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function clamp(value, low, high) {
  return Math.max(low, Math.min(high, value));
}
