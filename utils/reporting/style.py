"""The page's style sheet: one column, light and dark, wide and narrow screens."""

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1c2230; --soft: #5b6577; --line: #dfe3ea;
  --accent: #2f5fd0; --good: #1d7f53; --warn: #9a5b00; --warn-paper: #fff6e5;
  --c0: #2f5fd0; --c1: #d9622b; --c2: #1d7f53; --c3: #8a4bb8; --c4: #a33; }
@media (prefers-color-scheme: dark) { :root { --paper: #11141a; --card: #1a1f28; --ink: #e4e8ef; --soft: #9aa5b6;
  --line: #2e3542; --accent: #82a8ff; --good: #5fcf9b; --warn: #ffc766; --warn-paper: #2b2416;
  --c0: #82a8ff; --c1: #ff9b66; --c2: #5fcf9b; --c3: #c79bec; --c4: #ff8585; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; }
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 44px; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 8px; letter-spacing: -.02em; }
h2 { font-size: 1.4rem; margin: 0; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 26px 0 8px; }
p { margin: 6px 0; }
a { color: var(--accent); }
.soft, figcaption, caption { color: var(--soft); }
.lead { font-size: 1.08rem; max-width: 46em; }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin: 20px 0 8px; }
nav a { text-decoration: none; padding: 4px 12px; border: 1px solid var(--line); border-radius: 99px;
  background: var(--card); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 24px; margin: 22px 0; }
.missing { border-style: dashed; background: none; }
.facts { color: var(--soft); font-size: .9rem; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 0; }
.facts b { color: var(--ink); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px;
  margin: 18px 0; }
.figure { border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.figure h4 { margin: 0 0 8px; font-size: .92rem; } .figure h4::first-letter { text-transform: uppercase; }
.figure small { font-weight: 400; color: var(--soft); margin-left: 4px; }
.row { display: grid; grid-template-columns: 10.5em 1fr 4em; gap: 10px; align-items: center; font-size: .88rem;
  color: var(--soft); padding: 2px 0; }
.row b { text-align: right; font-weight: 500; font-variant-numeric: tabular-nums; }
.row.model, .row.model b { color: var(--ink); font-weight: 700; }
.track { height: 10px; border-radius: 5px; background: var(--paper); overflow: hidden; }
.track i { display: block; height: 100%; border-radius: 5px; background: var(--soft); opacity: .45; }
.model .track i { background: var(--accent); opacity: 1; }
.sheet { margin: 14px 0; }
.frame { width: fit-content; max-width: 100%; overflow: auto; background: #ececec; padding: 6px;
  border: 1px solid var(--line); border-radius: 10px; }
.sheet img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .88rem; margin: 0 0 6px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; }
.gallery figure { margin: 0; }
.gallery img { width: 100%; height: auto; border-radius: 10px; display: block; image-rendering: auto; }
.gallery figcaption { margin: 6px 0 0; }
.clip { border-top: 1px solid var(--line); padding: 12px 0; }
.clip p { margin: 0 0 6px; font-weight: 550; }
.players { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 10px; }
.players span { display: block; font-size: .84rem; color: var(--soft); }
audio { width: 100%; height: 36px; display: block; }
blockquote { margin: 10px 0; padding: 10px 16px; border-left: 3px solid var(--accent); background: var(--paper);
  border-radius: 0 10px 10px 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .88rem/1.5 ui-monospace, Menlo,
  Consolas, monospace; }
blockquote b { color: var(--accent); }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .88rem; padding-bottom: 6px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th small { display: block; font-weight: 400; }
td:first-child, th:first-child, .left { text-align: left; }
tr.bold td { font-weight: 700; }
tr.dim td { color: var(--soft); }
.wide { width: 100%; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 18px; }
.chart { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); }
.dot { fill: var(--card); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: .84rem; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.legend i.c0 { background: var(--c0); } .legend i.c1 { background: var(--c1); } .legend i.c2 { background: var(--c2); }
.legend i.c3 { background: var(--c3); } .legend i.c4 { background: var(--c4); }
.legend b { color: var(--ink); font-weight: 600; }
details { margin: 12px 0 0; font-size: .9rem; }
summary { cursor: pointer; color: var(--soft); }
dl { margin: 8px 0; } dt { font-weight: 600; } dd { margin: 0 0 6px; color: var(--soft); }
pre { margin: 8px 0; padding: 12px 14px; background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  overflow-x: auto; font: .86rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; }
.note { color: var(--warn); background: var(--warn-paper); border-radius: 8px; padding: 8px 12px; font-size: .9rem; }
.bar { height: 10px; border-radius: 5px; background: var(--accent); min-width: 2px; }
.bar-cell { width: 45%; }
footer { color: var(--soft); font-size: .86rem; padding-bottom: 50px; }
@media (max-width: 640px) { header { padding-top: 26px; } section { padding: 16px; border-radius: 10px; }
  h1 { font-size: 1.6rem; } header, main, footer { padding-left: 12px; padding-right: 12px; }
  .players, .gallery { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); } .bar-cell { display: none; }
  .row { grid-template-columns: 8em 1fr 3.6em; } }
@media print { nav, audio { display: none; } section { break-inside: avoid; } }
"""
