// The page: what the user chooses, what the connection says, and what is shown of both.

import { Camera } from "./camera.js";
import { Chooser } from "./chooser.js";
import { Connection } from "./connection.js";
import { Meter } from "./meter.js";
import { Recorder } from "./recorder.js";
import { drawSent, showReport, showSteps, showTracking } from "./readout.js";
import { portraitMessage } from "./wire.js";

const SLOW_TRACKING = 10;  // faces a second, below which pictures are suggested
const JUDGE_MS = 5000;
const COMMAND_GAP_MS = 1000;  // what the server takes of commands, see docs/serve.md

const $ = (id) => document.getElementById(id);
const screen = $("screen");
const paper = screen.getContext("2d", { alpha: false });

const site = await askSite();
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
let starting = false;  // the camera is being asked for
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

async function askSite() {
  try {
    const answer = await fetch("/api/site");
    if (!answer.ok) throw new Error(await answer.text());
    return await answer.json();
  } catch (error) {
    say("The server does not answer. Is it running? Then reload this page.", "bad");
    throw error;
  }
}

async function showStill(name) {
  const image = new Image();
  image.src = `/portraits/${name}.png`;
  await image.decode().catch(() => {});
  const current = !live && wanted.portrait === name && image.naturalWidth > 0;
  if (current) show(image, image.naturalWidth, image.naturalHeight);
}

function choosePortrait(name) {
  wanted.portrait = name;
  markOwn(false);
  live = false;
  showStill(name);
  if (connection.isOpen) begin();
}

function markOwn(chosen) {
  $("drop").classList.toggle("chosen", chosen);
  $("drop-text").textContent = chosen ? "In use. Choose another" : "Drop one here, or choose a file";
  if (chosen) for (const input of document.querySelectorAll("#gallery input")) input.checked = false;
}

async function chooseOwn(file) {
  if (choosing) return;  // one after the other
  choosing = true;
  try {
    await askAbout(file);
  } finally {
    choosing = false;
  }
}

async function askAbout(file) {
  let picture;
  try {
    picture = await chooser.show(file);
  } catch {
    say("That file is no picture this browser can read.", "bad");
    return;
  }
  if (!chooser.isOpen) return;  // cancelled before it left
  candidate = picture;
  if (connection.isOpen) offer();
  else connect();
  const face = await chooser.answer;
  candidate = null;
  if (face !== null) {
    Object.assign(wanted, { portrait: "own", face, own: picture });
    markOwn(true);
    if (connection.isOpen) begin();
    else connect();
  } else if (wanted.portrait === "own" && connection.isOpen && held?.picture !== wanted.own) {
    upload(wanted.own);  // in place of the one that was cancelled
  }
}

/** Have the server look for faces in the candidate, and show them. */
async function offer() {
  const picture = candidate;
  const found = await upload(picture);
  if (found === null || candidate !== picture) return;  // lost, and offered again; or cancelled
  if (found.why) chooser.refuse(`This picture cannot be used: ${found.why}.`);
  else chooser.pick(found.faces, found.size);
}

/** Send a picture; what the server says of it: {faces, size} or {why}, null when the connection
    is lost. The server holds one picture, the last. */
function upload(picture) {
  connection.send(portraitMessage(picture, ++uploads));
  const found = new Promise((resolve) => answers.set(uploads, resolve));
  held = { picture, found };
  return found;
}

function answered({ upload: number, ...found }) {
  answers.get(number)?.(found);
  answers.delete(number);
}

function forgetUploads() {
  for (const resolve of answers.values()) resolve(null);
  answers.clear();
  held = null;
}

/** Have the server hold the user's picture; what it says of it. Never the candidate, which nobody
    has agreed to: it may have been sent at any moment. */
async function holdOwn() {
  let found;
  do {
    const { own } = wanted;
    found = await (held?.picture === own ? held.found : upload(own));
  } while (found !== null && held?.picture !== wanted.own);
  return found;
}

function chooseTransport(name) {
  wanted.transport = name;
  meter.forget();
  hideNotice();
  showTracking(null);
  $("tracked").hidden = name === "frames";
  if (camera.isRunning) begin();
}

async function start() {
  if (camera.isRunning) {
    stop("Stopped.");
    return;
  }
  if (starting) return;
  if (wanted.transport === null) {
    notice("This server came without the face tracker for browsers. Without it your camera pictures "
      + "go to the server, which reads your face in them and keeps none.",
    "Send camera pictures", () => {
      toPictures();
      start();
    });
    say("Choose what leaves this device.", "calm");
    return;
  }
  starting = true;  // and not disabled: that would take the focus from who came by keyboard
  say("Waiting for the camera: allow it if the browser asks.", "busy");
  try {
    await camera.start();
  } catch (error) {
    say(cameraTrouble(error), "bad");
    return;
  } finally {
    starting = false;
  }
  $("start").textContent = "Stop";
  if (connection.isOpen) begin();
  else connect();
}

function stop(why, tone = "calm") {
  if (recorder.isRunning) record();
  camera.stop();
  connection.close();
  live = false;
  settle();
  forgetUploads();
  flying.clear();
  meter.forget();
  showReport(null);
  drawSent(null);
  if (candidate !== null) chooser.refuse(why);
  $("start").textContent = "Start the camera";
  $("recalibrate").disabled = $("record").disabled = true;
  say(why, tone);
}

function record() {
  if (recorder.isRunning) recorder.stop();
  else recorder.start();
  $("record").textContent = recorder.isRunning ? "Stop and save" : "Record";
  $("record").classList.toggle("running", recorder.isRunning);
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

let choosing = false;  // a picture of the user's own is being asked about
let candidate = null;  // that picture: not agreed to yet, and no portrait before it is
let uploads = 0;  // pictures sent
const answers = new Map();  // their numbers -> who waits for what the server says of them
let held = null;  // {picture, found} of the last one sent to this server, see upload()
let round = 0;  // a begin, or its end: what waited for something in another round has to give up
let beginning = false;  // the server makes a portrait ready
let again = 0;  // a timer: another one was chosen meanwhile
let begunMs = -Infinity;

function connect() {
  forgetUploads();
  connection.open(() => {
    if (candidate !== null) offer();
    if (candidate === null || camera.isRunning) begin();
  });
}

/** One portrait after the other, and no faster than the server takes commands: whoever walks
    through the portraits by arrow key gets the last of them. */
function begin() {
  clearTimeout(again);
  again = 0;
  live = false;
  const waitMs = begunMs + COMMAND_GAP_MS - performance.now();
  if (beginning || waitMs > 0) again = setTimeout(begin, Math.max(waitMs, 50));
  else beginNow();
}

function settle() {
  round++;
  beginning = false;
  clearTimeout(again);
  again = 0;
}

async function beginNow() {
  const mine = ++round;
  beginning = true;
  begunMs = performance.now();
  flying.clear();
  camera.forget();
  const { transport } = wanted;
  if (camera.isRunning && transport === "landmarks") {
    say("Loading the face tracker…", "busy");
  }
  try {
    if (camera.isRunning) await camera.use(transport);
  } catch {
    if (mine !== round) return;
    settle();
    notice("This browser cannot run the face tracker.", "Send camera pictures", toPictures);
    say("No face tracker in this browser.", "bad");
    return;
  }
  if (mine !== round) return;  // stopped while the tracker was loading
  if (wanted.portrait === "own") {
    const found = await holdOwn();
    if (mine !== round) return;
    const lacks = !(wanted.face < found?.faces?.length);
    if (wanted.portrait === "own" && lacks) {  // and no other was chosen meanwhile
      settle();
      say(`Your picture cannot be used: ${found?.why ?? "its face is not found again"}. Choose `
        + "another portrait.", "bad");
      return;
    }
  }
  if (transport !== wanted.transport) {  // changed meanwhile
    settle();
    begin();
    return;
  }
  judgeFrom = performance.now();
  const { portrait, face } = wanted;
  // Without a choice the camera does not run, and nothing is sent: either name will do.
  connection.say({ do: "begin", portrait, transport: transport ?? "landmarks", face });
}

const SAID = {
  connecting: () => say("Connecting…", "busy"),
  warming: () => say("Preparing the portrait…", "busy"),
  ready() {
    beginning = false;
    if (again) return;  // another portrait was chosen meanwhile
    live = true;
    $("recalibrate").disabled = false;
    $("record").disabled = !Recorder.isPossible;
    if (!camera.isRunning) say("Ready. Start the camera and move.", "calm");
  },
  faces: answered,
  "bad-portrait"(detail) {
    if (detail.upload !== undefined) {
      answered(detail);
      return;
    }
    settle();
    say(`This picture cannot be used: ${detail.why}. Choose another portrait.`, "bad");
  },
  "no-tracker"() {
    settle();
    say(site.tracker ? "The server has no face tracker. Choose “70 points of your face”."
      : "Neither this page nor the server has a face tracker. docs/serve.md tells how to install "
      + "one.", "bad");
  },
  full: ({ seconds }) => lost(`All seats are taken. Trying again every ${seconds} s.`),
  lost: ({ seconds }) => lost(`Connection lost. Trying again in ${seconds} s.`),
  closed: ({ why }) => stop(CLOSED[why] ?? "The server ended the session.", "bad"),
};

const CLOSED = {
  idle: "Stopped: nobody was seen for a while.",
  token: "This server wants a token: open the whole address that it printed, with #token=…",
  "illegal-token": "The token in the address has characters that no token can have. Open the whole "
    + "address that the server printed.",
  malformed: "The server did not understand this page. Reload it.",
  "too-fast": "Too much at once: the server ended the session.",
  fault: "Something went wrong at the server, and it ended the session. Its log tells what.",
};

function lost(text) {
  live = false;
  settle();
  forgetUploads();
  if (candidate !== null) chooser.refuse(text);
  begunMs = -Infinity;
  flying.clear();
  camera.forget();
  $("recalibrate").disabled = true;
  say(text, "bad");
}

async function showPicture({ detail: picture }) {
  const arrivedMs = performance.now();
  const mine = round;
  const sent = flying.get(picture.frame);
  flying.delete(picture.frame);
  if (again || (sent === undefined && picture.frame !== 0)) return;  // of the portrait before
  const image = await createImageBitmap(picture.jpeg);
  const over = again || mine !== round;  // stopped, lost or begun anew while it was decoded
  if (!over) show(image, image.width, image.height);
  image.close();
  if (over || sent === undefined) return;  // undefined: the portrait at rest
  if (picture.seen) {  // an empty chair has no faces a second
    meter.shown(sent, picture, arrivedMs, performance.now());
    showSteps(picture.steps);
  }
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

/** The focus goes to the button beside it, where it was in the notice. */
function hideNotice() {
  const inside = $("notice").contains(document.activeElement);
  $("notice").hidden = true;
  if (inside) $("start").focus();
}

function toPictures() {
  hideNotice();
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
  const gone = "The camera has gone. Connect it, then start again.";
  const failed = "Your face could not be read. Start again, or send camera pictures.";
  stop(detail.message === "unplugged" ? gone : failed, "bad");
});
connection.addEventListener("state", ({ detail }) => SAID[detail.state]?.(detail));
connection.addEventListener("next", () => live && camera.ask());
connection.addEventListener("picture", showPicture);

$("start").addEventListener("click", start);
$("record").addEventListener("click", record);
let recalibratedMs = -Infinity;
$("recalibrate").addEventListener("click", () => {
  if (performance.now() - recalibratedMs < COMMAND_GAP_MS) return;
  recalibratedMs = performance.now();
  connection.say({ do: "recalibrate" });
});
$("notice-no").addEventListener("click", hideNotice);
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
  landmarks.checked = false;
  landmarks.nextElementSibling.append(" (This server came without the tracker for browsers.)");
  $("tracked").hidden = true;
  wanted.transport = null;  // pictures are sent of nobody who has not asked for it
}
if (asked.get("transport") === "frames") {
  document.querySelector("input[value=frames]").click();
}
say("Choose a portrait, then start the camera.", "calm");
document.documentElement.classList.toggle("bare", asked.has("bare"));
document.documentElement.dataset.ready = "yes";
if (asked.has("start")) start();
