// transformers.js on the flavor transformers-js.
import { answer } from "./job.mjs";

await answer(async ({ folder, dtype }) => {
  // snippet
  const { AutoModel, AutoTokenizer, env } = await import("@huggingface/transformers");

  env.allowRemoteModels = false;
  env.localModelPath = ""; // `folder` is a path
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await AutoModel.from_pretrained(folder, { dtype }); // "fp32", "fp16" or "q8", which is INT8
  const end = tokenizer("").input_ids.data.at(-1);

  async function encode(texts) {
    const inputs = tokenizer(texts, { padding: true, truncation: true });
    const { data, dims } = inputs.input_ids;
    // A text that is cut loses its last special token: put it back.
    for (let last = dims[1] - 1; dims[1] === tokenizer.model_max_length && last < data.length; last += dims[1]) {
      if (inputs.attention_mask.data[last]) data[last] = end;
    }
    const { sentence_embedding } = await model(inputs);
    return sentence_embedding.tolist();
  }
  // end
  return encode;
}, ["@huggingface/transformers"]);
