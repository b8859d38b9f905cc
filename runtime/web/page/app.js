// The page: what the user chooses, what the connection says, and what is shown of both.

import { Camera } from "./camera.js";
import { Chooser } from "./chooser.js";
import { Connection } from "./connection.js";
import { Meter } from "./meter.js";
import { Recorder } from "./recorder.js";
import { drawSent, showReport, showTracking } from "./readout.js";
import { portraitMessage } from "./wire.js";

const SLOW_TRACKING = 10;  // faces a second, below which pictures are suggested
const JUDGE_MS = 5000;

const $ = (id) => document.getElementById(id);
const screen = $("screen");
const paper = screen.getContext("2d", { alpha: false });

const site = await (await fetch("/api/site")).json();
// Of the address, behind #: token=…, portrait=NAME, transport=frames, start, bare. Browsers keep it
// to themselves, so that a token is in no server's log.
const asked = new URLSearchParams(location.hash.slice(1));
const token = asked.get("token") ?? "";
const connection = new Connection(token);
const camera = new Camera(site);
const meter = new Meter();
const recorder = new Recorder(screen);
const chooser = new Chooser();

const wanted = { portrait: site.portraits[0], face: 0, transport: "landmarks", own: null };
const flying = new Map();  // frames on their way: number -> what Camera said of them
let live = false;  // the server has a portrait ready
let judged = false;  // whether the browser's tracking was found too slow
let judgeFrom = 0;

// ---- what the user does ----

function buildGallery() {
  for (const name of site.portraits) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), {
      type: "radio", name: "portrait", value: name, checked: name === wanted.portrait,
    });
    const image = Object.assign(new Image(96, 96), { src: `/portraits/${name}.png`, alt: "" });
    const text = document.createElement("span");
    text.textContent = name[0].toUpperCase() + name.slice(1);
    label.append(input, image, text);
    $("gallery").append(label);
    input.addEventListener("change", () => choosePortrait(name));
  }
  showStill(wanted.portrait);
}

async function showStill(name) {
  const image = new Image();
  image.src = `/portraits/${name}.png`;
  await image.decode();
  if (!live) show(image, image.naturalWidth, image.naturalHeight);
}

function choosePortrait(name) {
  wanted.portrait = name;
  markOwn(false);
  if (connection.isOpen) begin();
  else showStill(name);
}

function markOwn(chosen) {
  $("drop").classList.toggle("chosen", chosen);
  $("drop-text").textContent = chosen ? "In use. Choose another" : "Drop one here, or choose a file";
  if (chosen) for (const input of document.querySelectorAll("#gallery input")) input.checked = false;
}

async function chooseOwn(file) {
  try {
    wanted.own = await chooser.show(file);
  } catch {
    say("That file is no picture this browser can read.", "bad");
    return;
  }
  pickNext = true;
  if (connection.isOpen) connection.send(portraitMessage(wanted.own));
  else connect();
}

function chooseTransport(name) {
  wanted.transport = name;
  meter.forget();
  $("notice").hidden = true;
  showTracking(null);
  $("tracked").hidden = name === "frames";
  if (camera.isRunning) begin();
}

async function start() {
  if (camera.isRunning) {
    stop("Stopped.");
    return;
  }
  $("start").disabled = true;
  say("Waiting for the camera…", "busy");
  try {
    await camera.start();
  } catch (error) {
    say(cameraTrouble(error), "bad");
    $("start").disabled = false;
    return;
  }
  $("start").disabled = false;
  $("start").textContent = "Stop";
  if (connection.isOpen) begin();
  else connect();
}

function stop(why, tone = "calm") {
  if (recorder.isRunning) record();
  camera.stop();
  connection.close();
  live = false;
  flying.clear();
  $("start").textContent = "Start the camera";
  $("recalibrate").disabled = $("record").disabled = true;
  say(why, tone);
}

function record() {
  if (recorder.isRunning) recorder.stop();
  else recorder.start();
  $("record").textContent = recorder.isRunning ? "Stop and save" : "Record";
  $("record").setAttribute("aria-pressed", String(recorder.isRunning));
}

function cameraTrouble({ name }) {
  if (name === "SecurityError" && !isSecureContext) {
    return "Browsers give no camera to pages without https. Open it as http://localhost, or see "
      + "docs/serve.md for https.";
  }
  const reasons = {
    NotAllowedError: "The camera was refused. Allow it beside the address, then start again.",
    NotFoundError: "No camera was found. Connect one, then start again.",
    NotReadableError: "The camera is in use by another program.",
  };
  return reasons[name] ?? `The camera does not start (${name}).`;
}

// ---- what the connection says ----

let pickNext = false;  // a face of the user's picture is to be picked, not to be taken again

function connect() {
  connection.open(() => {
    if (pickNext || wanted.portrait === "own") connection.send(portraitMessage(wanted.own));
    else begin();
  });
}

async function begin() {
  live = false;
  flying.clear();
  camera.forget();
  const { transport } = wanted;
  if (camera.isRunning && transport === "landmarks") {
    say("Loading the face tracker…", "busy");
  }
  try {
    if (camera.isRunning) await camera.use(transport);
  } catch {
    notice("This browser cannot run the face tracker.", "Send camera pictures", toPictures);
    say("No face tracker in this browser.", "bad");
    return;
  }
  if (transport !== wanted.transport) return;  // changed while the tracker was loading
  judgeFrom = performance.now();
  const { portrait, face } = wanted;
  connection.say({ do: "begin", portrait, transport, face });
}

async function pickFace({ faces, size }) {
  if (!pickNext) {
    begin();  // the same picture again, after a lost connection
    return;
  }
  pickNext = false;
  const face = await chooser.pick(faces, size);
  if (face === null) {
    if (wanted.portrait !== "own") wanted.own = null;
    return;
  }
  Object.assign(wanted, { portrait: "own", face });
  markOwn(true);
  begin();
}

const SAID = {
  connecting: () => say("Connecting…", "busy"),
  warming: () => say("Preparing the portrait…", "busy"),
  ready() {
    live = true;
    $("recalibrate").disabled = false;
    $("record").disabled = !Recorder.isPossible;
    if (!camera.isRunning) say("Ready. Start the camera and move.", "calm");
  },
  faces: pickFace,
  "bad-portrait": ({ why }) => chooser.refuse(`This picture cannot be used: ${why}.`),
  "no-tracker": () => say("The server has no face tracker: it takes 70 points only.", "bad"),
  full: ({ seconds }) => lost(`All seats are taken. Trying again every ${seconds} s.`),
  lost: ({ seconds }) => lost(`Connection lost. Trying again in ${seconds} s.`),
  closed: ({ why }) => stop(CLOSED[why] ?? "The server ended the session.", "bad"),
};

const CLOSED = {
  idle: "Stopped: nobody was seen for a while.",
  token: "This server wants a token: open the whole address that it printed, with #token=…",
  malformed: "The server did not understand this page. Reload it.",
  "too-fast": "Too much at once: the server ended the session.",
};

function lost(text) {
  live = false;
  flying.clear();
  camera.forget();
  $("recalibrate").disabled = true;
  say(text, "bad");
}

async function showPicture({ detail: picture }) {
  const arrivedMs = performance.now();
  const sent = flying.get(picture.frame);
  flying.delete(picture.frame);
  const image = await createImageBitmap(picture.jpeg);
  show(image, image.width, image.height);
  image.close();
  if (sent === undefined) return;  // the portrait at rest
  meter.shown(sent, picture, arrivedMs, performance.now());
  if (!picture.seen) say("No face seen. The portrait rests until you are back.", "busy");
  else if (picture.neutral) say("Look straight ahead for a second…", "busy");
  else say("Live", "good");
}

// ---- what is shown ----

function show(image, width, height) {
  if (screen.width !== width || screen.height !== height) Object.assign(screen, { width, height });
  paper.drawImage(image, 0, 0);
}

function say(text, tone) {
  const status = $("status");
  if (status.textContent !== text) status.textContent = text;
  status.dataset.tone = tone;
}

function notice(text, yes, act) {
  $("notice-text").textContent = text;
  $("notice-yes").textContent = yes;
  $("notice-yes").onclick = act;
  $("notice").hidden = false;
}

function toPictures() {
  $("notice").hidden = true;
  document.querySelector("input[value=frames]").click();
}

function judgeTracking() {
  const rate = wanted.transport === "landmarks" && live ? meter.trackingRate() : null;
  showTracking(rate);
  const long = performance.now() - judgeFrom > JUDGE_MS;
  if (judged || rate === null || !long || rate >= SLOW_TRACKING) return;
  judged = true;
  notice(
    `This browser reads your face ${rate.toFixed(1)} times a second, which looks jerky. Pictures `
      + "would be faster, but your camera picture would go to the server.",
    "Send camera pictures", toPictures,
  );
}

camera.addEventListener("send", ({ detail: sent }) => {
  flying.set(sent.frame, sent);
  connection.send(sent.bytes);
  drawSent(sent, site.mesh.units);
});
camera.addEventListener("tracked", ({ detail }) => meter.tracked(detail.spent));
camera.addEventListener("fault", ({ detail }) => {
  stop(detail.message === "unplugged" ? "The camera has gone." : "The camera failed.", "bad");
});
connection.addEventListener("state", ({ detail }) => SAID[detail.state]?.(detail));
connection.addEventListener("next", () => live && camera.ask());
connection.addEventListener("picture", showPicture);

$("start").addEventListener("click", start);
$("record").addEventListener("click", record);
$("recalibrate").addEventListener("click", () => connection.say({ do: "recalibrate" }));
$("notice-no").addEventListener("click", () => ($("notice").hidden = true));
$("file").addEventListener("change", ({ target }) => {
  if (target.files.length > 0) chooseOwn(target.files[0]);
  target.value = "";
});
for (const input of document.querySelectorAll("input[name=transport]")) {
  input.addEventListener("change", () => chooseTransport(input.value));
}
for (const kind of ["dragover", "drop"]) {
  addEventListener(kind, (event) => event.preventDefault());
}
addEventListener("dragover", () => $("drop").classList.add("over"));
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", ({ dataTransfer }) => {
  $("drop").classList.remove("over");
  const file = [...dataTransfer.files].find(({ type }) => type.startsWith("image/"));
  if (file) chooseOwn(file);
});
setInterval(() => {
  showReport(meter.report());
  judgeTracking();
}, 500);

$("fill").hidden = !document.fullscreenEnabled;
$("fill").addEventListener("click", () => $("frame").requestFullscreen());
$("model").textContent = site.model;
if (site.portraits.includes(asked.get("portrait"))) wanted.portrait = asked.get("portrait");
buildGallery();
if (!site.tracker) {
  const landmarks = document.querySelector("input[value=landmarks]");
  landmarks.disabled = true;
  landmarks.nextElementSibling.append(" (This server came without the tracker for browsers.)");
}
if (!site.tracker || asked.get("transport") === "frames") {
  document.querySelector("input[value=frames]").click();
}
say("Choose a portrait, then start the camera.", "calm");
document.documentElement.classList.toggle("bare", asked.has("bare"));
document.documentElement.dataset.ready = "yes";
if (asked.has("start")) start();
