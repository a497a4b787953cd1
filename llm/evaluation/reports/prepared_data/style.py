"""How the page on prepared documents looks beyond the style of all reports, and its filters and sorting.

No text of a document goes in here. Without the script everything is there to read, unfiltered and in its first order.
"""

STYLE = """
main { max-width: 1240px; }
h2 { font-size: 1.25rem; margin: 44px 0 6px; }
h3 { font-size: .98rem; margin: 20px 0 6px; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .88rem; margin: 0 0 14px; }
a { color: var(--c0); }
.warnings { margin-top: 14px; }
.block { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 16px;
  margin-top: 12px; min-width: 0; }
.note { color: var(--soft); font-size: .88rem; margin: 0 0 10px; max-width: 82ch; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; font-size: .88rem; margin: 0 0 10px; }
.controls select, .controls input { font: inherit; padding: 3px 6px; max-width: 100%; color: inherit;
  background: var(--page); border: 1px solid var(--rule); border-radius: 6px; }
html:not(.scripted) .controls { display: none; }
.data { font-variant-numeric: tabular-nums; width: 100%; }
.data th, .data td { min-width: 0; padding: 4px 12px 4px 0; text-align: right; white-space: nowrap; }
.data .words { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7em; }
.data .words:first-child { min-width: 14em; }
.data .meter { text-align: left; min-width: 110px; }
.data thead th { vertical-align: bottom; border-top: 0; }
.scripted .sortable thead th { cursor: pointer; }
.data th[aria-sort=descending]::after { content: ' \\2193'; }
.data th[aria-sort=ascending]::after { content: ' \\2191'; }
.data tr.final td { font-weight: 650; }
.share { display: inline-block; width: 72px; height: 9px; border-radius: 3px; background: var(--gone); overflow: hidden;
  vertical-align: baseline; margin-right: 7px; }
.share i { display: block; height: 100%; background: var(--c2); }
.wide-share { width: 100%; min-width: 120px; margin: 0; height: 13px; background: var(--prompt); }
.wide-share i { background: var(--c0); }
:root { --gone: #f3c9b8; --mark-out: #ffd9cc; --mark-in: #c9f0df; }
@media (prefers-color-scheme: dark) { :root { --gone: #6b3522; --mark-out: #5b2a1b; --mark-in: #14463a; } }
[data-measure=documents] .m:not(.documents), [data-measure=characters] .m:not(.characters),
[data-measure=tokens] .m:not(.tokens) { display: none; }
.rules { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr));
  align-items: start; }
.rules .block { margin: 0; }
.block > h3:first-child { margin-top: 0; }
.tall { max-height: 27em; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; background: var(--card); }
.facts-line { font-size: .86rem; color: var(--soft); margin: 2px 0 8px; }
.facts-line b { color: var(--text); }
.histogram { position: relative; height: 120px; margin: 22px 4px 26px; }
.histogram svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.histogram .kept { fill: var(--c2); } .histogram .gone { fill: var(--c1); }
.histogram .zone { fill: var(--c1); opacity: .07; }
.histogram .bound { stroke: var(--text); stroke-width: 1.5; vector-effect: non-scaling-stroke; stroke-dasharray: 4 3; }
.histogram .base { stroke: var(--rule); vector-effect: non-scaling-stroke; }
.histogram .hit { fill: transparent; } .histogram .hit:hover { fill: var(--soft); fill-opacity: .18; }
.histogram span { position: absolute; font-size: 11px; line-height: 1; color: var(--soft); white-space: nowrap; }
.histogram .tick { top: calc(100% + 6px); transform: translateX(-50%); }
.histogram .at { bottom: calc(100% + 4px); color: var(--text); font-weight: 600; transform: translateX(-50%); }
.histogram .at.first { transform: none; } .histogram .at.last { transform: translateX(-100%); }
.legend .kept::before { background: var(--c2); height: 9px; }
.legend .gone::before { background: var(--c1); height: 9px; }
.rules details { padding: 0; border: 0; margin-top: 0; }
.document { border-top: 1px solid var(--rule); padding: 8px 0; min-width: 0; }
.document header { margin: 0 0 4px; gap: 2px 10px; font-size: .82rem; color: var(--soft); }
.document header * { overflow-wrap: anywhere; min-width: 0; }
.document pre { max-height: 13em; overflow: auto; font-size: 12px; background: var(--prompt); border-radius: 6px;
  padding: 7px 10px; }
.badge { padding: 0 8px; border-radius: 99px; font-weight: 600; border: 1px solid currentColor; color: var(--c1); }
.badge.stays { color: var(--c2); }
.value { color: var(--text); font-weight: 600; }
.columns { display: grid; gap: 0 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.columns > * { min-width: 0; }
.columns h3 { font-size: .88rem; margin: 8px 0 4px; }
.browser { max-height: 62rem; overflow-y: auto; }
.browser { display: grid; gap: 0 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.beside { display: grid; gap: 12px; grid-template-columns: 1fr 1fr; }
.beside > * { min-width: 0; }
.beside pre { background: var(--prompt); border-radius: 6px; padding: 8px 10px; max-height: 24em; overflow: auto;
  font-size: 12px; }
del, ins { text-decoration: none; border-radius: 3px; padding: 0 1px; }
del { background: var(--mark-out); } ins { background: var(--mark-in); }
.left-out { color: var(--soft); font-style: italic; }
.map { width: 100%; height: auto; display: block; touch-action: pan-y; }
.map circle { stroke-width: 1.6; }
.map .faint { opacity: .07; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 7px; }
code { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--prompt); border-radius: 4px; padding: 0 4px; }
[hidden] { display: none !important; }
@media (max-width: 640px) { .beside { grid-template-columns: 1fr; }
  h2 { font-size: 1.12rem; } .block { padding: 10px 12px; } }
"""

SCRIPT = """
document.documentElement.classList.add('scripted');
const number = cell => { const value = parseFloat(cell.dataset.value); return isNaN(value) ? null : value; };
for (const table of document.querySelectorAll('.sortable')) {
  table.querySelectorAll('thead th').forEach((head, column) => head.addEventListener('click', () => {
    const down = head.getAttribute('aria-sort') !== 'descending', body = table.tBodies[0];
    for (const other of table.querySelectorAll('thead th')) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const rows = [...body.rows].map(row => ({ row, value: number(row.cells[column]),
      text: row.cells[column].textContent }));
    rows.sort((a, b) => (down ? -1 : 1) * (a.value !== null && b.value !== null ? a.value - b.value
      : a.text.localeCompare(b.text)));
    body.append(...rows.map(({ row }) => row));
  }));
}
for (const control of document.querySelectorAll('select[data-measure-of]'))
  control.addEventListener('change', () => {
    document.getElementById(control.dataset.measureOf).dataset.measure = control.value;
  });
for (const control of document.querySelectorAll('select[data-rows-of]'))
  control.addEventListener('change', () => {
    for (const row of document.getElementById(control.dataset.rowsOf).tBodies[0].rows)
      row.hidden = row.dataset.group !== control.value;
  });
const browser = document.querySelector('.browser');
if (browser) {
  const controls = [...document.querySelectorAll('[data-filter]')], count = document.getElementById('shown-samples');
  const apply = () => {
    let shown = 0;
    for (const item of browser.children) {
      const fits = controls.every(({ dataset, value }) => !value || (dataset.filter === 'text'
        ? item.textContent.toLowerCase().includes(value.toLowerCase()) : item.dataset[dataset.filter] === value));
      item.hidden = !fits; shown += fits;
    }
    count.textContent = shown + ' of ' + browser.children.length + ' shown';
  };
  for (const control of controls) for (const event of ['input', 'change']) control.addEventListener(event, apply);
  apply();
}
for (const row of document.querySelectorAll('tr[data-cluster]')) {
  const circles = document.querySelectorAll('.map circle');
  const only = cluster => circles.forEach(circle =>
    circle.classList.toggle('faint', cluster !== null && circle.dataset.cluster !== cluster));
  row.addEventListener('pointerenter', () => only(row.dataset.cluster));
  row.addEventListener('pointerleave', () => only(null));
}
"""
