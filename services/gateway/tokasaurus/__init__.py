"""Tokasaurus' HTTP surface for cartridges, for its clients (https://github.com/ScalingIntelligence/tokasaurus)."""
