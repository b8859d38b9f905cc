// One WebSocket that comes back by itself.
//
// Events: "state" (detail: what the server says, or {state: "connecting" | "full" | "lost" |
// "closed"}),
// "next" (one frame may be sent), "picture" (detail: of wire.js).

import { readMessage } from "./wire.js";

export const CLOSED = { 4000: "idle", 4001: "malformed", 4002: "too-fast", 4003: "full",
  4004: "token", 4005: "fault" };
const FOR_GOOD = new Set(["idle", "malformed", "too-fast", "token", "fault"]);
const WAITS_MS = [500, 1000, 2000, 4000];
const FULL_WAIT_MS = 4000;

export class Connection extends EventTarget {
  #socket = null;
  #token;
  #failures = 0;
  #timer = 0;
  #onOpen = () => {};

  constructor(token) {
    super();
    this.#token = token;
  }

  get isOpen() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  /** Connect, now and after every loss; `onOpen` is called each time. */
  open(onOpen) {
    this.close();
    this.#onOpen = onOpen;
    this.#failures = 0;
    this.#connect();
  }

  close() {
    clearTimeout(this.#timer);
    const socket = this.#socket;
    this.#socket = null;
    socket?.close(1000);
  }

  say(command) {
    if (this.isOpen) this.#socket.send(JSON.stringify(command));
  }

  send(bytes) {
    if (this.isOpen) this.#socket.send(bytes);
  }

  #connect() {
    this.#tell({ state: "connecting" });
    const address = new URL("/api/drive", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    address.hash = "";
    const protocols = ["diffusionact", ...(this.#token ? [`token.${this.#token}`] : [])];
    let socket;
    try {
      socket = new WebSocket(address, protocols);
    } catch {  // of a token that no subprotocol can be named by
      this.#tell({ state: "closed", why: "illegal-token" });
      return;
    }
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.addEventListener("open", () => this.#onOpen());
    socket.addEventListener("message", ({ data }) => {
      if (socket === this.#socket) this.#take(data);
    });
    socket.addEventListener("close", ({ code }) => {
      if (socket === this.#socket) this.#lost(CLOSED[code]);
    });
  }

  #take(data) {
    this.#failures = 0;
    if (typeof data === "string") {
      this.#tell(JSON.parse(data));
      return;
    }
    const message = readMessage(data);
    this.dispatchEvent(new CustomEvent(message.kind, { detail: message }));
  }

  #lost(why) {
    this.#socket = null;
    if (FOR_GOOD.has(why)) {
      this.#tell({ state: "closed", why });
      return;
    }
    const known = WAITS_MS[Math.min(this.#failures++, WAITS_MS.length - 1)];
    const wait = why === "full" ? FULL_WAIT_MS : known;
    this.#tell({ state: why === "full" ? "full" : "lost", seconds: wait / 1000 });
    this.#timer = setTimeout(() => this.#connect(), wait);
  }

  #tell(detail) {
    this.dispatchEvent(new CustomEvent("state", { detail }));
  }
}
