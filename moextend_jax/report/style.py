"""The page's CSS: one column of cards, system fonts, light and dark by the reader's setting."""

from __future__ import annotations

from moextend_jax.report.canvas import COLOURS

_LIGHT = "".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items())
_DARK = "".join(f"--{name}:{dark};" for name, (_, dark) in COLOURS.items())

CSS = (
    f"""
:root{{color-scheme:light dark;{_LIGHT}--page:#f6f7f9;--card:#fff;--good:#00724f;--bad:#b3261e}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}--page:#121417;--card:#1b1e23;--good:#4ac596;--bad:#ff8a80}}}}
"""
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.015em}
h2{font-size:1.2rem;line-height:1.3;margin:0 0 12px;letter-spacing:-.005em}
.lead{color:var(--muted);margin:0 0 20px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin:0 0 18px}
section>:last-child{margin-bottom:0}
p{margin:0 0 12px;max-width:72ch}
.how,.missing{color:var(--muted);font-size:.9rem}
.missing{font-style:italic}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:0 0 18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px}
.tile b{display:block;font-size:1.7rem;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:.85rem;line-height:1.35;display:block}
.wide{overflow-x:auto;margin:0 0 12px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.95rem}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
td:last-child,th:last-child{padding-right:0}
th{font-weight:600;color:var(--muted);font-size:.85rem}
tr.ours td{font-weight:650;color:var(--ours)}
small{color:var(--muted);font-weight:400;font-size:.85em}
i{font-style:normal}.good{color:var(--good)}.bad{color:var(--bad)}
figure{margin:0}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(270px,100%),1fr));gap:14px 22px;margin:0 0 12px}
.pictures.two{grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr))}
.beside{display:grid;grid-template-columns:minmax(0,1fr);gap:12px 28px;align-items:center}
@media (min-width:860px){.beside{grid-template-columns:minmax(0,7fr) minmax(0,3fr)}}
figure svg,.frame svg{display:block;width:100%;height:auto}
figure svg *{stroke-linejoin:round}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:18px 22px;margin:0 0 12px}
.card{border-top:1px solid var(--line);padding-top:12px;overflow-wrap:anywhere}
.pair{display:flex;gap:8px;margin:0 0 8px}
.frame{position:relative;flex:1;max-width:50%;border-radius:6px;overflow:hidden;border:1px solid var(--line)}
.frame img{display:block;width:100%}.frame .drawing{image-rendering:pixelated}
.frame svg{position:absolute;inset:0;height:100%;fill:#ff5a00}
.grey img{filter:grayscale(1) brightness(.9)}
.card p{margin:0 0 6px}
.card ul{list-style:none;margin:0;padding:0;font-size:.92rem}
.card li{display:flex;justify-content:space-between;gap:12px}
.card li>span:first-child{color:var(--muted)}
.scale{display:inline-block;width:120px;height:.7em;border-radius:3px;margin:0 6px;vertical-align:-.02em;
background:linear-gradient(90deg,#888,#c96f3a,#ff5a00)}
details{margin:0 0 10px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--page);
border-radius:8px;padding:12px 14px}
@media (max-width:600px){.tile b{font-size:1.35rem}table{font-size:.85rem}th,td{white-space:normal;padding:6px 5px}
main{padding:20px 12px 40px}section{padding:16px 14px}h1{font-size:1.5rem}}
@media print{section{break-inside:avoid;border:0;padding:0}}
"""
)
