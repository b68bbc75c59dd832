"""A finished or running folder: records, results, model card, report page."""
