// The server's API: what models there are, and an answer as it is written.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, key, options) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = "Bearer " + key;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    // no JSON of ours: a proxy's page, perhaps
  }
  const wait = response.headers.get("Retry-After");
  const again = response.status === 429 || response.status === 503 ? ` Try again${wait ? ` in ${wait} s` : ""}.` : "";
  throw new ApiError((said || `The server answered ${response.status}.`) + again, response.status);
}

export async function models(key) {
  const response = await request("v1/models", key, {});
  return (await response.json()).data.map((model) => model.id);
}

// Ask for an answer to `body.messages`. `hear` is called with each part: {content, reasoning, finish, usage}.
// Rejects with ApiError, or with AbortError once `signal` is.
export async function answer(body, key, signal, hear) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const part = JSON.parse(data);
    if (part.error) throw new ApiError(part.error.message, 0);
    const choice = part.choices[0];
    hear({
      content: choice?.delta?.content || "",
      reasoning: choice?.delta?.reasoning_content || "",
      finish: choice?.finish_reason || "",
      usage: part.usage || null,
    });
  }
  throw new ApiError("The answer broke off: the server ended it early.", 0);
}

// The data of each server-sent event in a stream of bytes.
async function* events(bytes) {
  const reader = bytes.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const whole = text.split(/\r?\n\r?\n/);
      text = whole.pop();
      for (const event of whole) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The answer broke off: the connection was lost.", 0);
  } finally {
    reader.cancel().catch(() => {}); // a server stops at once when nobody listens
  }
}
