import * as ort from "../assets/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "../assets/tokenizers.min.mjs";
import { Encoder, similarity } from "./encoder.mjs";

const PAUSE = 250; // milliseconds without typing before the table is made anew

const status = document.getElementById("status");
const fields = ["left", "right"].map((id) => document.getElementById(id));

async function read(path) {
  const answer = await fetch(`bundle/${path}`);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

function lines(field) {
  return field.value.split("\n").map((line) => line.trim()).filter(Boolean);
}

function cell(kind, text, scope) {
  const element = document.createElement(kind);
  element.textContent = text;
  if (scope) element.scope = scope;
  return element;
}

function show(left, right, table) {
  const head = document.createElement("tr");
  head.append(cell("td", ""), ...right.map((text) => cell("th", text, "col")));
  head.firstChild.style.setProperty("--share", 0);
  const rows = left.map((text, index) => {
    const row = document.createElement("tr");
    const best = Math.max(...table[index]);
    const values = table[index].map((value) => {
      const made = cell("td", value.toFixed(3));
      made.dataset.value = value;
      made.style.setProperty("--share", Math.min(1, Math.max(0, value)));
      made.classList.toggle("best", value === best && right.length > 1);
      return made;
    });
    row.append(cell("th", text, "row"), ...values);
    return row;
  });
  document.querySelector("#similarities thead").replaceChildren(head);
  document.querySelector("#similarities tbody").replaceChildren(...rows);
}

async function start() {
  const info = await (await fetch("info.json")).json();
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
  const encoder = await Encoder.load({ ort, Tokenizer, read, graph: info.graph, options });
  let running = null;
  let changed = true;

  async function compare() {
    while (changed) {
      changed = false;
      const [left, right] = fields.map(lines);
      const started = performance.now();
      const vectors = await encoder.encode([...left, ...right]);
      const taken = Math.round(performance.now() - started);
      const others = vectors.slice(left.length);
      show(left, right, vectors.slice(0, left.length).map((a) => others.map((b) => similarity(a, b))));
      status.textContent = `${info.name}, ${info.graph}: ${vectors.length} sentences in ${taken} ms`;
    }
    running = null;
  }

  let pause;
  const later = () => {
    clearTimeout(pause);
    pause = setTimeout(() => {
      changed = true;
      running ??= compare().catch(fail);
    }, PAUSE);
  };
  fields.forEach((field) => field.addEventListener("input", later));
  await (running = compare());
  self.encoder = encoder; // for the console
}

function fail(error) {
  status.textContent = `The model cannot be run here: ${error.message ?? error}`;
  status.dataset.failed = "yes";
}

start().catch(fail);
