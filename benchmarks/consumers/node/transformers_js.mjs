// transformers.js on the flavor transformers-js.
import { answer } from "./job.mjs";

await answer(async ({ folder, dtype }) => {
  // snippet
  const { AutoModel, AutoTokenizer, env } = await import("@huggingface/transformers");

  env.allowRemoteModels = false;
  env.localModelPath = ""; // `folder` is a path
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await AutoModel.from_pretrained(folder, { dtype }); // "fp32", "fp16" or "q8", which is INT8

  async function encode(texts) {
    const inputs = await tokenizer(texts, { padding: true, truncation: true });
    const { sentence_embedding } = await model(inputs);
    return sentence_embedding.tolist();
  }
  // end
  return encode;
}, ["@huggingface/transformers"]);
