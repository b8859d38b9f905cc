// The bytes between page and server, as docs/serve.md has them. Little-endian.

const HEAD_BYTES = 16;
const TIMES_BYTES = 32;
const KIND = { landmarks: 1, frame: 2, portrait: 3, next: 16, picture: 17 };
const SEEN = 1;
const NEUTRAL = 2;

/** A message of one kind: sixteen bytes, and room for `size` more. */
function message(kind, size, { flags = 0, frame = 0, capturedUs = 0 } = {}) {
  const bytes = new Uint8Array(HEAD_BYTES + size);
  const view = new DataView(bytes.buffer);
  view.setUint8(0, kind);
  view.setUint8(1, flags);
  view.setUint32(4, frame >>> 0, true);
  view.setBigUint64(8, BigInt(capturedUs), true);
  return { bytes, view };
}

/** points: 70 x [x, y, z] in units of the protocol, or null when no face was seen. */
export function landmarksMessage(points, frame, capturedUs) {
  const size = points === null ? 0 : points.length * 6;
  const { bytes, view } = message(KIND.landmarks, size, {
    flags: points === null ? 0 : SEEN, frame, capturedUs,
  });
  points?.flat().forEach((value, i) => {
    const rounded = Math.max(-32768, Math.min(32767, Math.round(value)));
    view.setInt16(HEAD_BYTES + 2 * i, rounded, true);
  });
  return bytes;
}

export function frameMessage(jpeg, frame, capturedUs) {
  const { bytes } = message(KIND.frame, jpeg.length, { frame, capturedUs });
  bytes.set(jpeg, HEAD_BYTES);
  return bytes;
}

export function portraitMessage(encoded, upload) {
  const { bytes } = message(KIND.portrait, encoded.length, { frame: upload });
  bytes.set(encoded, HEAD_BYTES);
  return bytes;
}

/** What the server said: {kind: "next"}, or {kind: "picture", ...} with its times in ms. */
export function readMessage(buffer) {
  const view = new DataView(buffer);
  if (view.getUint8(0) === KIND.next) return { kind: "next" };
  if (view.getUint8(0) !== KIND.picture) throw new Error(`kind ${view.getUint8(0)}`);
  const flags = view.getUint8(1);
  const at = HEAD_BYTES;
  return {
    kind: "picture",
    seen: Boolean(flags & SEEN),
    neutral: Boolean(flags & NEUTRAL),
    steps: view.getUint16(2, true),
    frame: view.getUint32(4, true),
    capturedMs: Number(view.getBigUint64(8, true)) / 1000,
    receivedMs: Number(view.getBigUint64(at, true)) / 1000,
    sentMs: Number(view.getBigUint64(at + 8, true)) / 1000,
    trackMs: view.getUint32(at + 16, true) / 1000,
    waitMs: view.getUint32(at + 20, true) / 1000,
    renderMs: (view.getUint32(at + 24, true) + view.getUint32(at + 28, true)) / 1000,
    jpeg: new Blob([new Uint8Array(buffer, at + TIMES_BYTES)], { type: "image/jpeg" }),
  };
}
