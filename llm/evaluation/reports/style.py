"""How the report looks, and what happens when a pointer moves over a chart. No text of a run goes in here."""

STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --text: #1b1f24; --soft: #626b78; --rule: #e2e5ea;
  --prompt: #eef1f5; --warn: #fff4e0; --warn-rule: #e8a33d; --level: #8a94a3;
  --c0: #2563eb; --c1: #d9480f; --c2: #0b8a5f; --c3: #8b3fd9; --c4: #b8860b; --c5: #c2255c; }
@media (prefers-color-scheme: dark) { :root { --page: #101317; --card: #191d23; --text: #e4e8ee; --soft: #98a2b0;
  --rule: #2b313a; --prompt: #252b34; --warn: #2e2515; --warn-rule: #b77f2c; --level: #7c8796;
  --c0: #6ea0ff; --c1: #ff8f5a; --c2: #43c99a; --c3: #c08bff; --c4: #e0b64a; --c5: #ff7fa8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 34px 0 12px; }
header { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 20px; }
.status { padding: 2px 11px; border-radius: 99px; font-size: .82rem; font-weight: 600; border: 1px solid currentColor;
  color: var(--c1); }
.status.complete { color: var(--c2); }
.card, .chart, details, .warnings { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 14px 16px; min-width: 0; }
.card small, .soft { color: var(--soft); }
.card > small { display: block; }
.card small { font-size: .82rem; }
.facts { margin-top: 12px; }
.card b.figure small { display: inline; font-weight: 400; }
.card b.figure { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 12px; }
.figures { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin-top: 12px; }
.scores { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); margin-top: 12px; }
.chart.wide { grid-column: 1 / -1; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 7px 12px; align-items: center; margin-top: 10px;
  font-size: .9rem; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 14px; border-radius: 3px; background: var(--level); opacity: .55; }
.bars .own { font-weight: 650; }
.bars i.own { background: var(--c0); opacity: 1; }
.warnings { background: var(--warn); border-color: var(--warn-rule); padding: 12px 16px; margin: 0 0 16px; }
.warnings ul { margin: 4px 0 0; padding-left: 20px; overflow-wrap: anywhere; }
.chart { margin: 0; padding: 12px 14px 8px; min-width: 0; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; font-size: .9rem;
  margin-bottom: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; color: var(--soft); font-size: .82rem; }
.legend span::before { content: ''; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  vertical-align: middle; margin-right: 6px; background: var(--c); }
.legend .resume::before { background: none; height: 11px; width: 0; border-left: 2px dotted var(--soft); }
.plot { position: relative; height: 210px; margin: 0 6px 22px 44px; touch-action: pan-y; cursor: crosshair; }
.wide .plot { height: 280px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; }
.plot svg * { vector-effect: non-scaling-stroke; fill: none; }
.plot span { position: absolute; font-size: 11.5px; line-height: 1; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.plot .y { right: 100%; margin-right: 7px; transform: translateY(-50%); }
.plot .x { top: 100%; margin-top: 7px; transform: translateX(-50%); }
.plot .name { left: 6px; }
.plot .name.above { transform: translateY(calc(-100% - 4px)); }
.plot .name.below { transform: translateY(5px); }
.axis { text-align: center; font-size: 11.5px; color: var(--soft); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .resumed { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 4; }
svg .level { stroke: var(--level); stroke-width: 1.4; stroke-dasharray: 6 4; }
svg .line { stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
svg .dots { stroke: var(--c); stroke-width: 6; stroke-linecap: round; }
.plot svg .band { fill: var(--c); fill-opacity: .16; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); }
.plot .cursor { top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.plot .reading { top: 4px; padding: 6px 9px; line-height: 1.5; border-radius: 6px; background: var(--card);
  border: 1px solid var(--rule); color: var(--text); white-space: pre; pointer-events: none; z-index: 1;
  box-shadow: 0 2px 8px rgb(0 0 0 / .15); }
pre { margin: 0; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; tab-size: 4; }
.sample { margin-bottom: 10px; padding: 0; overflow: hidden; }
.sample pre { padding: 12px 16px; max-height: 26em; overflow: auto; }
.prompt { background: var(--prompt); border-radius: 3px; color: var(--soft); box-decoration-break: clone;
  -webkit-box-decoration-break: clone; padding: 1px 0; }
.key { font-size: .85rem; color: var(--soft); margin: -6px 0 10px; }
details { padding: 0 16px; margin-top: 10px; }
summary { cursor: pointer; padding: 11px 0; font-weight: 600; font-size: .95rem; }
details > :last-child { margin-bottom: 14px; }
.scroll { overflow-x: auto; }
.narrow th { min-width: 0; }
.narrow td { overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-top: 1px solid var(--rule);
  overflow-wrap: anywhere; font-weight: 400; }
th { color: var(--soft); min-width: 9em; }
tr:first-child > * { border-top: 0; }
footer { margin-top: 34px; font-size: .82rem; color: var(--soft); }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } .bars { grid-template-columns: 1fr auto; gap: 3px 10px; }
  .bars span:nth-child(3n + 1) { grid-column: 1 / -1; margin-top: 5px; }
  .figures { grid-template-columns: repeat(auto-fill, minmax(135px, 1fr)); } }
@media print { body { background: #fff; } .chart, .card { break-inside: avoid; } }
"""

# Reads curves back from their own coordinates, so that no number is in the page twice.
SCRIPT = """
for (const chart of document.querySelectorAll('.chart')) {
  const plot = chart.querySelector('.plot');
  const [x0, x1] = chart.dataset.x.split(' ').map(Number), [y0, y1] = chart.dataset.y.split(' ').map(Number);
  const curves = [...chart.querySelectorAll('polyline')].map(line => ({ name: line.dataset.name,
    points: line.getAttribute('points').split(' ').map(pair => pair.split(',').map(Number)) }));
  const cursor = document.createElement('span'), reading = document.createElement('span');
  cursor.className = 'cursor'; reading.className = 'reading';
  const format = value => value === 0 ? '0' : Math.abs(value) < 1e-3 ? value.toExponential(2)
    : Math.abs(value) < 1000 ? value.toPrecision(4) : Math.round(value).toLocaleString('en');
  plot.addEventListener('pointermove', event => {
    const box = plot.getBoundingClientRect(), at = 1000 * (event.clientX - box.left) / box.width;
    const nearest = curves.map(({ name, points }) => ({ name, point: points.reduce(
      (best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best) }));
    const x = nearest.reduce((best, n) => Math.abs(n.point[0] - at) < Math.abs(best - at) ? n.point[0] : best, 1e9);
    const rows = nearest.filter(n => Math.abs(n.point[0] - x) < 12)
      .map(n => n.name + '  ' + format(y1 - n.point[1] / 1000 * (y1 - y0)));
    const step = Math.round(x0 + x / 1000 * (x1 - x0)).toLocaleString('en');
    reading.textContent = [chart.dataset.unit + ' ' + step, ...rows].join('\\n');
    cursor.style.left = x / 10 + '%';
    reading.style.left = x < 500 ? 'calc(' + x / 10 + '% + 10px)' : 'auto';
    reading.style.right = x < 500 ? 'auto' : 'calc(' + (100 - x / 10) + '% + 10px)';
    plot.append(cursor, reading);
  });
  plot.addEventListener('pointerleave', () => { cursor.remove(); reading.remove(); });
}
"""
