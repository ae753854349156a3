"""What the methods share: where (`sites`), `keys`, values (`value`, over `plans`, `rows`, `rollout`) and the
update.
"""
