// Every page: loaded anew when `secateur leaderboard serve` has built the pages anew.
"use strict";

async function reloadWhenRebuilt() {
  // Only `secateur leaderboard serve` has this address; it says when the pages were last built.
  if (!location.protocol.startsWith("http")) return;
  const ask = async () => { const answer = await fetch("/built"); return answer.ok ? answer.text() : null; };
  const first = await ask().catch(() => null);
  if (first === null) return;
  setInterval(async () => { const now = await ask().catch(() => first); if (now !== first) location.reload(); }, 3000);
}

reloadWhenRebuilt();
