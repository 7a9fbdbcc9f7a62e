"""The Feast repository: entities, views and services over the tables of longtrail.schema."""
