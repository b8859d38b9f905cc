// Figures, the bar of stages, and the picture of what is sent.

import { STAGES } from "./meter.js";

const NAMES = { capture: "Camera", track: "Find face", up: "Up", wait: "Queue", render: "Render",
  down: "Down", show: "Show" };
const $ = (id) => document.getElementById(id);
const sent = $("sent");

const rows = new Map(STAGES.map((stage) => [stage, makeRow(stage)]));
const total = makeRow("total");

function makeRow(stage) {
  const row = document.createElement("tr");
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = NAMES[stage] ?? "Camera to screen";
  if (stage in NAMES) name.dataset.stage = stage;
  row.append(name, document.createElement("td"), document.createElement("td"));
  $("times").append(row);
  const part = document.createElement("i");
  part.dataset.stage = stage;
  if (stage in NAMES) $("stages").append(part);
  return { row, part };
}

/** report: of Meter; null clears all figures. */
export function showReport(report) {
  $("fps").textContent = report === null ? "–" : report.fps.toFixed(1);
  $("latency").textContent = report === null ? "–" : report.p50.toFixed(0);
  if (report === null) {
    $("steps").textContent = "–";
    for (const one of [...rows.values(), total]) fill(one, null, null);
    return;
  }
  for (const { stage, p50, p95 } of report.stages) fill(rows.get(stage), p50, p95);
  fill(total, report.p50, report.p95);
}

function fill({ row, part }, p50, p95) {
  row.children[1].textContent = p50?.toFixed(1) ?? "–";
  row.children[2].textContent = p95?.toFixed(1) ?? "–";
  part.style.flexGrow = String(p50 ?? 0);
}

/** steps: diffusion steps of the last picture. The server takes fewer where it would be too slow. */
export function showSteps(steps) {
  const text = String(steps);
  if ($("steps").textContent !== text) $("steps").textContent = text;
}

/** rate: faces a second that this browser tracks, or null. */
export function showTracking(rate) {
  $("tracking").textContent = rate === null ? "–" : rate.toFixed(1);
}

/** Draw what was sent: 70 points, `units` to the longer side, or the camera picture; or null. */
export function drawSent(what, units) {
  if (what === null) {
    Object.assign(sent, { width: 320, height: 240 });
    $("sent-text").textContent = "Nothing is sent now.";
    return;
  }
  const { bytes, points, picture } = what;
  const paper = sent.getContext("2d");
  $("sent-text").textContent = `${bytes.length.toLocaleString("en")} bytes a frame`;
  if (picture) {
    Object.assign(sent, { width: picture.width, height: picture.height });
    paper.drawImage(picture, 0, 0);
    return;
  }
  Object.assign(sent, { width: 320, height: 240 });  // clears it, too
  paper.fillStyle = getComputedStyle(sent).color;
  for (const [x, y] of points ?? []) {
    paper.beginPath();
    paper.arc((x / units) * 320, (y / units) * 320, 1.8, 0, 7);
    paper.fill();
  }
}
