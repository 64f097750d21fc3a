"""Parser: documents into pages of Markdown and text.

RPCs: Parse (a stream: accepted, progress, pages, summary), Inspect (free, local), ListProviders.
State: none of its own; the local provider keeps warm worker processes.
Peers: storage, through the router's address, for documents that are stored objects.

`core` has the nouns and the order of a parse, `media` tells a document's type from its bytes,
`sandbox` runs parsers on hostile bytes in processes without environment, network or files,
`providers` has one file a provider: `local` (PDF, DOCX, PPTX, XLSX, HTML, Markdown, text) and
`mock`. Adding a provider is adding a file there with `Settings` and `create`.
"""
