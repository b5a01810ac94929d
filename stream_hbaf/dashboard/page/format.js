/** Numbers and times as text for people. */

export function percent(share) {
  if (share == null) return "";
  if (share > 0 && share < 0.005) return "<1\u00a0%";
  return `${Math.round(share * 100)}\u00a0%`;
}

export function milliseconds(ms) {
  return ms >= 10000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms)} ms`;
}

// Making a formatter takes longer than a hundred uses of it.
const CLOCK = new Intl.DateTimeFormat([], {hour: "2-digit", minute: "2-digit", second: "2-digit"});

export function clock(time) {
  return CLOCK.format(new Date(time));
}

/** A duration: 42 s, 3 min, 2.0 h. */
export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}
