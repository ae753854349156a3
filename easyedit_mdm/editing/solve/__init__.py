"""What the methods share: where (`sites`), `keys`, values (`value`, over `plans`, `rows`, `rollout`) and the
update; for those that train weights the loss over states (`losses`) and the `training`.
"""
