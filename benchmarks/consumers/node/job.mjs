// What every consumer does: load once, encode each text alone and all in batches, write the vectors.
import { readFile, writeFile } from "node:fs/promises";

const BATCH = 32;

/** load: (job) => Promise<texts => Promise<Float32Array[]>> */
export async function answer(load, packages) {
  const job = JSON.parse(await readFile(process.argv[2], "utf8"));
  const encode = await load(job);
  const alone = [];
  const batched = [];
  for (const text of job.texts) alone.push(...(await encode([text])));
  for (let start = 0; start < job.texts.length; start += BATCH) {
    batched.push(...(await encode(job.texts.slice(start, start + BATCH))));
  }
  await writeVectors(`${job.output}/alone.f32`, alone);
  await writeVectors(`${job.output}/batched.f32`, batched);
  const versions = {};
  for (const name of packages) {
    const file = new URL(`node_modules/${name}/package.json`, import.meta.url);
    versions[name] = JSON.parse(await readFile(file, "utf8")).version;
  }
  await writeFile(`${job.output}/versions.json`, JSON.stringify({ node: process.versions.node, ...versions }));
}

async function writeVectors(path, vectors) {
  await writeFile(path, Buffer.concat(vectors.map((vector) => Buffer.from(Float32Array.from(vector).buffer))));
}
