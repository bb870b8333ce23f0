// What the clients in JavaScript have in common; see tests/clients/loop.py for what is said on standard input and output.

import readline from "node:readline";

export const QUESTION = "How is the weather?";
export const CHAT = [{ role: "user", content: QUESTION }];
export const PARAMETERS = {
  type: "object",
  properties: {
    city: { type: "string", enum: ["Paris", "Rome"] },
    days: { type: "integer", minimum: 1, maximum: 9 },
  },
  required: ["city", "days"],
  additionalProperties: false,
};
// What the model talks is nonsense otherwise, and never ends to think.
export const THINKING = {
  structured_outputs: { grammar: '%llguidance {}\nstart: "Rain, perhaps." </think> "Fine."\n' },
  chat_template_kwargs: { thinking: true },
};

/** A fetch that notes the statuses that an SDK got while it tried, and does something about the bad ones. */
export function attempts(onRefusal = () => {}) {
  const seen = { statuses: [], retry_after: [], waits: [] };
  let last = null;
  const noting = async (url, options) => {
    const answer = await fetch(url, options);
    const now = performance.now();
    if (last !== null) seen.waits.push((now - last) / 1000);
    last = now;
    seen.statuses.push(answer.status);
    if (answer.status >= 400) {
      seen.retry_after.push(answer.headers.get("retry-after") ?? "");
      onRefusal();
    }
    return answer;
  };
  return { seen, fetch: noting };
}

export const only = (values) => {
  if (values.length !== 1) throw new Error(`expected one, got ${values.length}`);
  return values[0];
};

/** Runs the scenarios that standard input asks for, until it ends. */
export async function serve(scenarios) {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { scenario, ...target } = JSON.parse(line);
    let said;
    try {
      said = { ok: true, saw: await scenarios[scenario](target) };
    } catch (error) {
      said = { ok: false, error: `${error?.stack ?? error}\n${JSON.stringify(error?.cause ?? null)}` };
    }
    process.stdout.write(`${JSON.stringify({ scenario, ...said })}\n`);
  }
  process.exit(0);
}
