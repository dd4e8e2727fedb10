"use strict";
// Similarities of every patch to the one under the pointer, from a few 8-bit numbers a patch.

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const colours = bytesOf(document.body.dataset.colours); // 256 times red, green, blue

function explore(section) {
  const [rows, columns] = section.dataset.grid.split(",").map(Number);
  const weights = section.dataset.weights.split(",").map(Number);
  const values = new Int8Array(bytesOf(section.dataset.values).buffer);
  const size = weights.length;
  const figure = section.querySelector("template").content.firstElementChild.cloneNode(true);
  section.querySelector(".tiles").append(figure);
  const canvas = figure.querySelector("canvas");
  const note = figure.querySelector("figcaption span");
  [canvas.width, canvas.height] = [columns, rows];
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
  let pinned = Number(section.dataset.start);

  function cosines(patch) {
    const found = new Float64Array(rows * columns);
    for (let k = 0; k < size; k++) {
      const factor = weights[k] * values[patch * size + k];
      for (let p = 0; p < found.length; p++) found[p] += factor * values[p * size + k];
    }
    found[patch] = 1; // which needs no approximation
    return found.map((cosine) => Math.min(cosine, 1));
  }

  function show(patch) {
    const found = cosines(patch);
    const low = Math.min(found.reduce((a, b) => Math.min(a, b)), 1 - 1e-4);
    found.forEach((cosine, p) => {
      const level = Math.round(((cosine - low) / (1 - low)) * 255);
      picture.data.set(colours.subarray(3 * level, 3 * level + 3), 4 * p);
      picture.data[4 * p + 3] = 255;
    });
    context.putImageData(picture, 0, 0);
    const row = Math.floor(patch / columns), column = patch % columns;
    for (const box of pointers) {
      box.style.left = `${(100 * column) / columns}%`;
      box.style.top = `${(100 * row) / rows}%`;
    }
    note.textContent = `patch in column ${column + 1}, row ${row + 1}; ` +
      `colours from ${low.toFixed(2)} to 1, approximately`;
  }

  function under(event, frame) {
    const box = frame.getBoundingClientRect();
    const place = (at, start, length, count) =>
      Math.min(Math.max(Math.floor(((at - start) / length) * count), 0), count - 1);
    return place(event.clientY, box.top, box.height, rows) * columns +
      place(event.clientX, box.left, box.width, columns);
  }

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  section.classList.add("live");
  for (const frame of frames) {
    frame.addEventListener("pointermove", (event) => show(under(event, frame)));
    frame.addEventListener("pointerleave", () => show(pinned));
    frame.addEventListener("click", (event) => show((pinned = under(event, frame))));
  }
  const frame = figure.querySelector(".frame");
  frame.tabIndex = 0;
  frame.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const row = Math.min(Math.max(Math.floor(pinned / columns) + step[0], 0), rows - 1);
    const column = Math.min(Math.max((pinned % columns) + step[1], 0), columns - 1);
    show((pinned = row * columns + column));
  });
  show(pinned);
}

document.querySelectorAll("section[data-values]").forEach(explore);
