// Talking to the mesh, with the key that this tab keeps.

const KEPT = "tokenloom.key";

export const key = () => sessionStorage.getItem(KEPT) ?? "";

export function keep(text) {
  if (text) sessionStorage.setItem(KEPT, text);
  else sessionStorage.removeItem(KEPT);
}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** An answer, or Refused with what the mesh says. */
export async function ask(path, { body, headers = {}, signal } = {}) {
  const answer = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers: {
      authorization: `Bearer ${key()}`, ...(body === undefined ? {} : { "content-type": "application/json" }), ...headers,
    },
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer", signal,
  });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new Refused(answer.status, said?.error?.message ?? `HTTP status ${answer.status}`);
}

export const json = async (path, options) => (await ask(path, options)).json();

/** The events of an answer as they come: {data} or {comment}. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield { data: line.slice(5).trim() };
        else if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** Follows a watch until the signal says stop, and comes back to it when it ends. `heard` gets each message, `state` how
 *  the connection is: "" while it is there, or why it is not. A refusal that no second try changes ends it. */
export async function follow(path, { heard, state, signal }) {
  for (let wait = 500; !signal.aborted; wait = Math.min(2 * wait, 8000)) {
    try {
      let first = true;
      for await (const { data } of events(await ask(path, { signal }))) {
        if (!data) continue;
        const message = JSON.parse(data);
        if (message.error) throw new Refused(503, message.error.message);
        heard(message, first);
        if (first) state("");
        first = false;
        wait = 500;
      }
      state("the mesh ended the watch");
    } catch (error) {
      if (signal.aborted) return;
      state(error.message || "no connection", error.status);
      if (error.status >= 400 && error.status < 500 && error.status !== 429) return;
    }
    await new Promise(again => {
      const timer = setTimeout(again, wait);
      signal.addEventListener("abort", () => { clearTimeout(timer); again(); }, { once: true });
    });
  }
}
