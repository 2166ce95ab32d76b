// Runs a bundle with ONNX Runtime and a tokenizer library: in browsers with onnxruntime-web, in Node with
// onnxruntime-node. The counterpart of distillabse/encoder.py, and as short a recipe.
//
//   const encoder = await Encoder.load({ ort, Tokenizer, read, graph: "onnx/model.onnx" });
//   const [a, b] = await encoder.encode(["Where is the station?", "Wo ist der Bahnhof?"]);

export class Encoder {
  /**
   * @param ort onnxruntime-web or onnxruntime-node
   * @param Tokenizer the class of @huggingface/tokenizers
   * @param read (path inside the bundle) => Promise<Uint8Array>
   * @param graph path of the graph inside the bundle
   * @param options of the ONNX Runtime session
   */
  static async load({ ort, Tokenizer, read, graph, options }) {
    const json = async (path) => JSON.parse(new TextDecoder().decode(await read(path)));
    const encoder = new Encoder();
    const settings = await json("sentence_bert_config.json");
    const prompts = await json("config_sentence_transformers.json");
    const tokenizer = await json("tokenizer_config.json");
    encoder.ort = ort;
    encoder.maxLength = settings.max_seq_length;
    encoder.lowerCase = Boolean(settings.do_lower_case);
    encoder.prompt = prompts.default_prompt_name ? prompts.prompts[prompts.default_prompt_name] : "";
    encoder.tokenizer = new Tokenizer(await json("tokenizer.json"), tokenizer);
    encoder.padId = encoder.tokenizer.token_to_id(tokenizer.pad_token.content ?? tokenizer.pad_token);
    encoder.session = await ort.InferenceSession.create(await read(graph), options);
    return encoder;
  }

  /** Unit vectors (Float32Array) of texts, in their order. */
  async encode(texts, batchSize = 32) {
    const vectors = [];
    for (let start = 0; start < texts.length; start += batchSize) {
      const rows = texts.slice(start, start + batchSize).map((text) => this.tokenIds(text));
      vectors.push(...(await this.run(rows)));
    }
    return vectors;
  }

  /** Token ids of one text, cut at the model's longest input; special tokens stay. */
  tokenIds(text) {
    const written = this.prompt + text;
    const given = this.lowerCase ? written.toLowerCase() : written;
    const { ids } = this.tokenizer.encode(given);
    const surplus = ids.length - this.maxLength;
    if (surplus <= 0) return ids;
    // [CLS] text [SEP]: what the tokenizer puts after a text is what it puts after its inner tokens.
    const inner = this.tokenizer.encode(given, { add_special_tokens: false }).ids;
    const before = ids.findIndex((_, place) => inner.every((id, index) => ids[place + index] === id));
    const end = before + inner.length;
    return [...ids.slice(0, end - surplus), ...ids.slice(end)];
  }

  async run(rows) {
    const width = Math.max(...rows.map((row) => row.length));
    const shape = [rows.length, width];
    const ids = new BigInt64Array(rows.length * width).fill(BigInt(this.padId));
    const mask = new BigInt64Array(rows.length * width);
    rows.forEach((row, index) =>
      row.forEach((id, place) => {
        ids[index * width + place] = BigInt(id);
        mask[index * width + place] = 1n;
      }),
    );
    const inputs = {
      input_ids: new this.ort.Tensor("int64", ids, shape),
      attention_mask: new this.ort.Tensor("int64", mask, shape),
    };
    const { sentence_embedding: output } = await this.session.run(inputs, ["sentence_embedding"]);
    const dimension = output.dims[1];
    return rows.map((_, index) => output.data.slice(index * dimension, (index + 1) * dimension));
  }
}

/** The cosine of two unit vectors. */
export function similarity(a, b) {
  return a.reduce((sum, value, index) => sum + value * b[index], 0);
}
