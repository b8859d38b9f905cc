// What is on the screen, as a file of this browser's: nothing of it goes to the server.

const KINDS = [["video/mp4;codecs=avc1.42E01E", "mp4"], ["video/webm;codecs=vp9", "webm"],
  ["video/webm;codecs=vp8", "webm"], ["video/webm", "webm"]];
const FPS = 30;

export class Recorder {
  #canvas;
  #recorder = null;

  constructor(canvas) {
    this.#canvas = canvas;
  }

  static get isPossible() {
    return Boolean(globalThis.MediaRecorder) && "captureStream" in HTMLCanvasElement.prototype;
  }

  get isRunning() {
    return this.#recorder !== null;
  }

  start() {
    const kinds = KINDS.filter(([type]) => MediaRecorder.isTypeSupported(type));
    const [mimeType, ending] = kinds[0] ?? ["", "webm"];
    const parts = [];
    const recorder = new MediaRecorder(this.#canvas.captureStream(FPS), { mimeType });
    recorder.addEventListener("dataavailable", ({ data }) => parts.push(data));
    recorder.addEventListener("stop", () => save(new Blob(parts, { type: mimeType }), ending));
    recorder.start(1000);
    this.#recorder = recorder;
  }

  stop() {
    this.#recorder?.stop();
    this.#recorder?.stream.getTracks().forEach((track) => track.stop());
    this.#recorder = null;
  }
}

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `diffusionact-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
