"""`easyedit-mdm app`: a page in the browser to edit facts and watch a model write. `desk` is what it does,
`pages` what it shows; both work without Gradio. `blocks` lays them out and needs the extra `app`.
"""
