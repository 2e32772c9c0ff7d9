"use strict";

const EVERY_MS = 2000;
const PATIENCE_MS = 30000; // figures come with the engine's next step
const shown = {};
const asOf = document.getElementById("as-of");
const alarm = document.getElementById("alarm");
let isEnded = false;

function say(text) {
  document.body.classList.toggle("is-old", text !== "");
  if (alarm.textContent !== text) alarm.textContent = text;
}

function show(figures) {
  for (const [name, html] of Object.entries(figures.parts)) {
    if (shown[name] === html) continue; // what stays can be selected
    shown[name] = html;
    document.getElementById(name).innerHTML = html; // escaped where it was rendered
  }
  asOf.textContent = figures.as_of;
  say("");
}

async function refresh() {
  const answer = await fetch(location.pathname + "/figures", {
    cache: "no-store",
    signal: AbortSignal.timeout(PATIENCE_MS),
  });
  if (answer.status === 403) {
    isEnded = true;
    say("This address has ended. Run edgekv ps --page for a new one.");
  } else if (answer.ok) {
    show(await answer.json());
  } else {
    throw new Error(answer.statusText);
  }
}

async function run() {
  while (!isEnded) {
    await new Promise((resume) => setTimeout(resume, EVERY_MS));
    if (document.hidden) continue;
    try {
      await refresh();
    } catch {
      say("edgekv does not answer. These figures are old: " + asOf.textContent + ".");
    }
  }
}

run();
