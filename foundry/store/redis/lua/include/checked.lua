-- A script behind this changes nothing, and answers `empty`, until the pointers are restored.
--@include epoch

if not restored then return {'empty'} end
