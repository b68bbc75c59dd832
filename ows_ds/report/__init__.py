"""The verb `report`: folders of runs -> one HTML page that needs no network."""
