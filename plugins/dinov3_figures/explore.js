"use strict";
// Similarities of every patch to the one under the pointer, from a few 8-bit numbers a patch.

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const clamp = (place, count) => Math.min(Math.max(place, 0), count - 1);

function explore(section) {
  const [rows, columns] = section.dataset.grid.split(",").map(Number);
  const colors = bytesOf(section.dataset.colors); // 256 times red, green, blue
  const weights = section.dataset.weights.split(",").map(Number);
  const values = new Int8Array(bytesOf(section.dataset.values).buffer);
  let pinned = Number(section.dataset.start);

  // The tile that shows them: a copy of the first one, with a canvas in place of its picture.
  const tile = section.querySelector("figure").cloneNode(true);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height, canvas.className] = [columns, rows, "crisp"];
  tile.querySelector(".frame").replaceChildren(canvas);
  const note = tile.querySelector("figcaption span");
  tile.querySelector("figcaption").replaceChildren("similarity to the patch under the pointer", note);
  section.querySelector(".images").append(tile);
  const context = canvas.getContext("2d");
  const picture = context.createImageData(columns, rows);
  const frames = [...section.querySelectorAll(".frame")];
  const pointers = frames.map((frame) => {
    const box = document.createElement("div");
    box.className = "mark pointer";
    box.style.width = `${100 / columns}%`;
    box.style.height = `${100 / rows}%`;
    frame.append(box);
    return box;
  });

  function show(patch) {
    const cosines = new Float64Array(rows * columns);
    weights.forEach((weight, k) => {
      const factor = weight * values[patch * weights.length + k];
      for (let p = 0; p < cosines.length; p++) cosines[p] += factor * values[p * weights.length + k];
    });
    cosines[patch] = 1; // which needs no approximation
    const low = Math.min(cosines.reduce((a, b) => Math.min(a, b)), 1 - 1e-4);
    cosines.forEach((cosine, p) => {
      const level = Math.round(((Math.min(cosine, 1) - low) / (1 - low)) * 255);
      picture.data.set(colors.subarray(3 * level, 3 * level + 3), 4 * p);
      picture.data[4 * p + 3] = 255;
    });
    context.putImageData(picture, 0, 0);
    const row = Math.floor(patch / columns), column = patch % columns;
    for (const box of pointers) {
      box.style.left = `${(100 * column) / columns}%`;
      box.style.top = `${(100 * row) / rows}%`;
    }
    note.textContent = `patch in column ${column + 1}, row ${row + 1}; ` +
      `colors from ${low.toFixed(2)} to 1, approximately`;
  }

  function under(event, frame) {
    const box = frame.getBoundingClientRect();
    return clamp(Math.floor(((event.clientY - box.top) / box.height) * rows), rows) * columns +
      clamp(Math.floor(((event.clientX - box.left) / box.width) * columns), columns);
  }

  section.classList.add("live");
  for (const frame of frames) {
    frame.addEventListener("pointermove", (event) => show(under(event, frame)));
    frame.addEventListener("pointerleave", () => show(pinned));
    frame.addEventListener("click", (event) => show((pinned = under(event, frame))));
  }
  const frame = tile.querySelector(".frame");
  frame.tabIndex = 0;
  frame.setAttribute("role", "img");
  frame.setAttribute("aria-label", "similarity to the patch under the pointer; arrow keys move it");
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  frame.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    pinned = clamp(Math.floor(pinned / columns) + step[0], rows) * columns +
      clamp((pinned % columns) + step[1], columns);
    show(pinned);
  });
  show(pinned);
}

document.querySelectorAll("section[data-values]").forEach(explore);
