// The camera, and the two ways from its pictures to messages. Pull: a message is made of the newest
// picture when the server asks, and never waits in a queue.

import { openFaceMesh } from "./facemesh.js";
import { frameMessage, landmarksMessage } from "./wire.js";

const WANTED = { width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 30 },
  facingMode: "user" };
const SENT_SIDE = 480;  // of camera pictures that are sent
const SENT_QUALITY = 0.8;

export class Camera extends EventTarget {
  #video = document.createElement("video");
  #site;
  #faceMesh = null;
  #opening = null;  // a promise of it: it is loaded once, however often it is asked for
  #transport = "landmarks";
  #canvas = document.createElement("canvas");
  #newest = null;  // {capturedMs, seenMs} of the video's picture, not yet used
  #tracked = null;  // landmarks, not yet sent
  #busy = false;
  #asked = false;
  #frame = 0;
  #lastUs = 0;
  #running = false;

  /** Events: "send" (detail: {bytes, ...}), "tracked" (detail: ms), "fault" (detail: an error). */
  constructor(site) {
    super();
    this.#site = site;
    this.#video.muted = true;
    this.#video.playsInline = true;
  }

  get video() {
    return this.#video;
  }

  get isRunning() {
    return this.#running;
  }

  /** Ask for the camera. Throws what getUserMedia throws, or an error without a secure context. */
  async start() {
    if (!navigator.mediaDevices) throw new DOMException("no camera here", "SecurityError");
    const stream = await navigator.mediaDevices.getUserMedia({ video: WANTED, audio: false });
    this.#video.srcObject = stream;
    stream.getVideoTracks()[0].addEventListener("ended", () => {
      this.stop();
      this.dispatchEvent(new CustomEvent("fault", { detail: new Error("unplugged") }));
    });
    try {
      await this.#video.play();
    } catch (error) {
      this.stop();  // its light goes out
      throw error;
    }
    this.#running = true;
    this.#watch();
  }

  stop() {
    this.#running = false;
    this.#video.srcObject?.getTracks().forEach((track) => track.stop());
    this.#video.srcObject = null;
    this.forget();
  }

  /** Choose "landmarks" or "frames"; the first loads its tracker, and throws if it cannot. */
  async use(transport) {
    this.forget();
    this.#transport = transport;
    if (transport !== "landmarks") return;
    this.#opening ??= openFaceMesh(this.#site.mesh);
    try {
      this.#faceMesh = await this.#opening;
    } catch (error) {
      this.#opening = null;
      throw error;
    }
  }

  /** The server asks for a frame. */
  ask() {
    this.#asked = true;
    this.#go();
  }

  /** What was asked for is not wanted any more. */
  forget() {
    this.#asked = false;
    this.#tracked = null;
  }

  #watch() {
    this.#video.requestVideoFrameCallback((now, about) => {
      if (!this.#running) return;
      this.#newest = { capturedMs: about.captureTime ?? now, seenMs: performance.now() };
      this.#go();
      this.#watch();
    });
  }

  #go() {
    if (this.#transport === "landmarks") {
      this.#send();
      this.#track();
    } else if (this.#asked && this.#newest !== null && !this.#busy) {
      this.#sendPicture();
    }
  }

  async #track() {
    if (this.#busy || this.#newest === null || this.#faceMesh === null) return;
    const picture = this.#newest;
    this.#newest = null;
    this.#busy = true;
    try {
      const { videoWidth, videoHeight } = this.#video;
      const points = await this.#faceMesh.track(this.#video, videoWidth, videoHeight);
      const trackedMs = performance.now();
      this.#tracked = { ...picture, points, trackedMs };
      const spent = trackedMs - picture.seenMs;
      this.dispatchEvent(new CustomEvent("tracked", { detail: { spent, points } }));
    } catch (error) {
      if (!this.#running) return;  // stopped, and its picture with it
      this.dispatchEvent(new CustomEvent("fault", { detail: error }));
    } finally {
      this.#busy = false;
    }
    if (this.#transport === "landmarks") this.#send();
  }

  #send() {
    if (!this.#asked || this.#tracked === null) return;
    const { points, capturedMs, seenMs, trackedMs } = this.#tracked;
    this.#tracked = null;
    const [frame, capturedUs] = this.#number(capturedMs);
    const bytes = landmarksMessage(points, frame, capturedUs);
    this.#out({ bytes, frame, capturedMs, seenMs, trackedMs, points });
  }

  async #sendPicture() {
    const { capturedMs, seenMs } = this.#newest;
    this.#newest = null;
    this.#busy = true;
    try {
      const jpeg = await this.#jpeg();
      if (!this.#asked || this.#transport !== "frames") return;
      const [frame, capturedUs] = this.#number(capturedMs);
      const bytes = frameMessage(jpeg, frame, capturedUs);
      this.#out({ bytes, frame, capturedMs, seenMs, trackedMs: performance.now(),
        picture: this.#canvas });
    } catch (error) {
      this.dispatchEvent(new CustomEvent("fault", { detail: error }));
    } finally {
      this.#busy = false;
    }
  }

  async #jpeg() {
    const { videoWidth, videoHeight } = this.#video;
    const scale = Math.min(1, SENT_SIDE / Math.max(videoWidth, videoHeight));
    this.#canvas.width = Math.round(videoWidth * scale);
    this.#canvas.height = Math.round(videoHeight * scale);
    const paper = this.#canvas.getContext("2d", { willReadFrequently: true, alpha: false });
    paper.drawImage(this.#video, 0, 0, this.#canvas.width, this.#canvas.height);
    const blob = await new Promise((resolve) => {
      this.#canvas.toBlob(resolve, "image/jpeg", SENT_QUALITY);
    });
    return new Uint8Array(await blob.arrayBuffer());
  }

  /** A frame's number and its capture time, which always rises. */
  #number(capturedMs) {
    this.#lastUs = Math.max(Math.round(capturedMs * 1000), this.#lastUs + 1);
    return [++this.#frame, this.#lastUs];
  }

  #out(sent) {
    this.#asked = false;
    this.dispatchEvent(new CustomEvent("send", { detail: { ...sent, sentMs: performance.now() } }));
  }
}
