// The face in a picture, read in this browser: MediaPipe's face mesh and the table that the server
// hands out, which vertices of the mesh make which of the 68 points.

const PLACE = "/tracker/";

/** A tracker of one face. `mesh`: {points, irises, units} of /api/site. */
export async function openFaceMesh(mesh) {
  await loadScript(`${PLACE}face_mesh.js`);
  const graph = new globalThis.FaceMesh({ locateFile: (name) => PLACE + name });
  // These two and no more: setting minDetectionConfidence aborts the graph.
  graph.setOptions({ maxNumFaces: 1, refineLandmarks: true });
  let found = null;
  graph.onResults((results) => {
    found = results.multiFaceLandmarks?.[0] ?? null;
  });
  await graph.initialize();

  return {
    /** 70 x [x, y, z] in units of the protocol, or null when there is no face. */
    async track(picture, width, height) {
      found = null;
      await graph.send({ image: picture });
      return found === null ? null : toPoints(found, mesh, width, height);
    },
    close: () => graph.close(),
  };
}

function toPoints(vertices, { points, irises, units }, width, height) {
  const scale = units / Math.max(width, height);
  const at = (i) => {
    const { x, y, z } = vertices[i];
    return [x * width * scale, y * height * scale, z * width * scale];
  };
  const face = points.map((ids) => {
    const ends = ids.map(at);
    return [0, 1, 2].map((axis) => ends.reduce((sum, end) => sum + end[axis], 0) / ends.length);
  });
  return [...face, ...irises.map(at)];
}

function loadScript(src) {
  if (globalThis.FaceMesh) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = src;
    script.addEventListener("load", resolve);
    script.addEventListener("error", () => reject(new Error("the tracker could not be loaded")));
    document.head.append(script);
  });
}
