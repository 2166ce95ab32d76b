// onnxruntime-node with the recipe of distillabse/demo/page/encoder.mjs.
import { answer } from "./job.mjs";

await answer(async ({ folder, file }) => {
  // snippet
  const { readFile } = await import("node:fs/promises");
  const ort = await import("onnxruntime-node");
  const { Tokenizer } = await import("@huggingface/tokenizers");
  const { Encoder } = await import("./encoder.mjs"); // a copy of distillabse/demo/page/encoder.mjs

  const read = (path) => readFile(`${folder}/${path}`);
  const encoder = await Encoder.load({ ort, Tokenizer, read, graph: file });
  // end
  return (texts) => encoder.encode(texts);
}, ["onnxruntime-node", "@huggingface/tokenizers"]);
