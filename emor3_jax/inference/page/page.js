// Sends a photograph to the server and shows the prediction. Texts are set as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
let file = null;
let maxBytes = Infinity;

const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function choose(chosen) {
  fail("");
  $("result").hidden = true;
  file = null;
  if (!chosen) {
    // Nothing was chosen.
  } else if (!chosen.type.startsWith("image/")) {
    fail(`${chosen.name} is no image`);
  } else if (chosen.size > maxBytes) {
    fail(`${chosen.name} is too large: an image may have ${Math.floor(maxBytes / 2 ** 20)} MiB`);
  } else {
    file = chosen;
  }
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").hidden = !file;
  $("hint").hidden = Boolean(file);
  if (file) $("preview").src = URL.createObjectURL(file);
  else $("preview").removeAttribute("src");
  $("ask").disabled = !file;
}

function row(name, share, note) {
  const line = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = name;
  const value = document.createElement("td");
  value.textContent = percent(share);
  const last = document.createElement("td");
  if (note) {
    last.textContent = note;
  } else {
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = share;
    bar.setAttribute("aria-label", `${name}: ${percent(share)}`);
    last.append(bar);
  }
  line.append(head, value, last);
  return line;
}

function show(found) {
  $("label").textContent = found.label || "None of the labels";
  const steps = found.steps.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  });
  $("steps").replaceChildren(...steps);
  $("response").hidden = steps.length > 0;
  $("response").textContent = found.response;
  const shares = Object.entries(found.probabilities || {}).sort((a, b) => b[1] - a[1]);
  $("shares").hidden = !shares.length;
  $("probabilities").tBodies[0].replaceChildren(
    ...shares.map(([name, share]) => {
      const line = row(name, share);
      line.classList.toggle("chosen", name === found.label);
      return line;
    }),
  );
  $("judged").hidden = found.coherence === null && found.consistency === null;
  $("reflections").tBodies[0].replaceChildren(
    row("Coherence", found.coherence, "the first two steps, read alone, speak of this emotion"),
    row("Consistency", found.consistency, "the first step describes the photograph"),
    row("Trust", found.trust, "the mean of both"),
  );
  $("result").hidden = false;
}

async function ask(event) {
  event.preventDefault();
  if (!file) return;
  fail("");
  $("result").hidden = true;
  $("ask").disabled = true;
  $("status").textContent = "Thinking. The first photograph takes longest.";
  try {
    const query = new URLSearchParams({ question: $("question").value });
    const answer = await fetch(`/api/predict?${query}`, { method: "POST", body: file });
    const found = await answer.json();
    if (answer.ok) show(found);
    else fail(found.error.message);
  } catch (error) {
    fail(`The server does not answer (${error.message}). Is it still running?`);
  } finally {
    $("status").textContent = "";
    $("ask").disabled = !file;
  }
}

$("file").addEventListener("change", () => choose($("file").files[0]));
$("form").addEventListener("submit", ask);
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  // Beside the box too: there the browser would open the photograph in place of the page.
  window.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
  });
}
window.addEventListener("paste", (event) => {
  const pasted = event.clipboardData.files[0];
  if (pasted) choose(pasted);
});

fetch("/api/about")
  .then((answer) => answer.json())
  .then((about) => {
    maxBytes = about.max_bytes;
    $("about").textContent = `${about.policy}, among ${about.labels.join(", ")}`;
    $("question").placeholder = about.question;
  })
  .catch(() => fail("The server does not answer. Is it still running?"));
