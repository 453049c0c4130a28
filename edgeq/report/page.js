// Moves the choice between the rows of the comparison. Texts are set as text, never as HTML.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector) => document.querySelectorAll(selector);
const slider = document.getElementById("bits");
const last = data.rows.length - 1; // rows begin with the most bits, the slider with the fewest

function choose(index) {
  const row = data.rows[index];
  slider.value = last - index;
  slider.setAttribute("aria-valuetext", `${row.name}, ${row.bits} bits per weight`);
  for (const part of all("[data-figure]")) part.textContent = row[part.dataset.figure];
  for (const part of all("[data-row]")) part.classList.toggle("chosen", part.dataset.row == index);
  for (const part of all("[data-tensor]")) showTensor(part, row.tensors[part.dataset.tensor]);
  for (const part of all("[data-answer]")) {
    const [text, right] = row.answers[part.dataset.answer];
    part.textContent = text;
    part.className = right ? "right" : "wrong";
  }
}

function showTensor(part, [bits, format, share, error]) {
  const name = data.names[part.dataset.tensor];
  part.textContent = bits;
  part.title = `${name}: ${format}${error && ", error " + error}`;
  part.style.setProperty("--share", share);
}

slider.addEventListener("input", () => choose(last - slider.value));
for (const part of all("[data-row]")) part.addEventListener("click", () => choose(+part.dataset.row));

const detail = document.querySelector(".detail");
for (const part of all("[data-tensor]")) {
  part.addEventListener("click", () => {
    detail.hidden = false;
    detail.textContent = part.title;
  });
}

const differing = document.getElementById("differing");
if (differing) {
  differing.addEventListener("change", () => {
    document.querySelector(".answers tbody").classList.toggle("differing", differing.checked);
  });
}
for (const part of all(".slider, .only")) part.hidden = false;
choose(data.chosen);
