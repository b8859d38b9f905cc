// A picture of the user's own: brought upright and to a sensible size here, its faces found by the
// server, one of them picked.

const SIDE = 1024;
const QUALITY = 0.92;

export class Chooser {
  #dialog = document.querySelector("#chooser");
  #text = document.querySelector("#chooser-text");
  #canvas = document.querySelector("#own");
  #faces = document.querySelector("#faces");
  #consent = document.querySelector("#consent");
  #use = document.querySelector("#use");
  #face = null;
  #resolve = () => {};
  answer = Promise.resolve(null);  // the face that the user picks, from 0; null when they cancel

  constructor() {
    this.#consent.addEventListener("change", () => this.#update());
    this.#use.addEventListener("click", () => this.#end(this.#face));
    this.#dialog.addEventListener("close", () => this.#end(null));
  }

  get isOpen() {
    return this.#dialog.open;
  }

  /** Show a picture; the bytes that are to be sent, as JPEG. Throws when it is no picture. */
  async show(file) {
    const picture = await createImageBitmap(file, { imageOrientation: "from-image" });
    const scale = Math.min(1, SIDE / Math.max(picture.width, picture.height));
    this.#canvas.width = Math.max(1, Math.round(picture.width * scale));
    this.#canvas.height = Math.max(1, Math.round(picture.height * scale));
    const paper = this.#canvas.getContext("2d", { alpha: false });
    paper.fillStyle = "#fff";
    paper.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
    paper.drawImage(picture, 0, 0, this.#canvas.width, this.#canvas.height);
    picture.close();
    this.#clear();
    this.#consent.checked = false;
    this.#say("It is sent to the server, which looks for faces…");
    this.answer = new Promise((resolve) => {
      this.#resolve = resolve;
    });
    if (!this.#dialog.open) this.#dialog.showModal();
    const blob = await new Promise((resolve) => {
      this.#canvas.toBlob(resolve, "image/jpeg", QUALITY);
    });
    return new Uint8Array(await blob.arrayBuffer());
  }

  /** Show the faces that were found. */
  pick(boxes, [width, height]) {
    this.#clear();  // shown before, when the connection was lost meanwhile
    if (boxes.length === 0) {
      this.refuse("No face was found. Wanted: one seen from the front, not too small.");
    } else {
      const many = boxes.length > 1;
      this.#say(many ? `${boxes.length} faces: pick one.` : "One face was found.");
      boxes.forEach((box, i) => this.#faces.append(this.#button(box, i, width, height)));
      this.#choose(many ? null : 0);
    }
  }

  /** Say why this picture cannot be used; the dialog stays, to be read. */
  refuse(why) {
    this.#say(why);
    this.#face = null;
    this.#update();
  }

  #clear() {
    this.#faces.querySelectorAll("button").forEach((button) => button.remove());
    this.#face = null;
    this.#update();
  }

  #button([left, top, wide, high], i, width, height) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = String(i + 1);
    button.setAttribute("aria-label", `Face ${i + 1}`);
    button.style.left = `${(100 * left) / width}%`;
    button.style.top = `${(100 * top) / height}%`;
    button.style.width = `${(100 * wide) / width}%`;
    button.style.height = `${(100 * high) / height}%`;
    button.addEventListener("click", () => this.#choose(i));
    return button;
  }

  #choose(face) {
    this.#face = face;
    this.#faces.querySelectorAll("button").forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === face));
    });
    this.#update();
  }

  #update() {
    this.#use.disabled = this.#face === null || !this.#consent.checked;
  }

  #say(text) {
    this.#text.textContent = text;
  }

  #end(face) {
    const resolve = this.#resolve;
    this.#resolve = () => {};
    if (this.#dialog.open) this.#dialog.close();
    resolve(face);
  }
}
