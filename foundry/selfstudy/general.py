"""Prompts about no document in particular, of many kinds: behind a cartridge a model should answer them as ever."""

GENERAL_PROMPTS = tuple(
    """\
What is the capital of France?
Explain why the sky is blue.
Write a short poem about autumn.
How do I boil an egg?
List three uses of a paper clip.
What is the difference between a crocodile and an alligator?
Translate "good morning" into Spanish.
What is 17 times 23?
Give me a recipe for pancakes.
Who wrote Romeo and Juliet?
How does a bicycle stay upright?
Write a polite email that declines a meeting.
What are the primary colours?
Summarize the story of Little Red Riding Hood.
What is a prime number?
Name five animals that live in the sea.
How can I sleep better?
What does a compiler do?
Write a Python function that reverses a string.
Why do leaves change colour?
What is photosynthesis?
Give three tips for a job interview.
How far is the Moon from the Earth?
What is the boiling point of water?
Tell me a joke.
What is the past tense of "to go"?
Explain gravity to a child.
What is the largest planet of the solar system?
How do vaccines work?
Write a haiku about the sea.
Name the seven days of the week.
What is inflation in economics?
How do I change a flat tyre?
What is a metaphor? Give an example.
Who painted the Mona Lisa?
Convert 10 kilometres to miles.
What is the chemical symbol of gold?
Describe a cat without using the word "cat".
What is the square root of 144?
Give me a synonym for "happy".
What are the benefits of exercise?
How does a refrigerator work?
Write the beginning of a detective story.
What is the plural of "mouse"?
How many continents are there?
What is the purpose of a constitution?
Explain what a database index is.
Which is heavier, a kilogram of iron or a kilogram of feathers?
How do I make a cup of tea?
What causes tides?
Write a slogan for a shoe shop.
What is the opposite of "ancient"?
How do birds fly?
Name three musical instruments with strings.
What is a black hole?
Give an example of a renewable source of energy.
What does "carpe diem" mean?
How do I remove a stain of red wine?
What is the area of a circle with a radius of 3?
Write a thank-you note to a teacher.
What is DNA?
Sort these words: pear, apple, fig.
Why is sleep important?
What is the longest river of the world?
How do I learn a new language?
Write a SQL query that counts the rows of a table.
What is the freezing point of water in Fahrenheit?
Who was the first person on the Moon?
Give me two names for a dog.
What is a noun?
How do earthquakes happen?
Write a sentence with the word "whisper".
What is the Pythagorean theorem?
How long do elephants live?
Explain the rules of tic-tac-toe.
What is the currency of Japan?
What should I pack for a day of hiking?
How is glass made?
What is machine learning?
Suggest a gift for a grandmother.
What is the difference between weather and climate?
Write a dialogue between a baker and a customer.
How many legs does a spider have?
What is the function of the heart?
Complete the proverb: "The early bird ..."
What is an algorithm?
How do I keep plants alive?
What is the speed of light?
Name a book for children.
Why do we have leap years?
What is 15 percent of 80?
How do I write a good introduction?
What is democracy?
Describe the taste of a lemon.
What are vitamins?
Write three questions for a history quiz.""".splitlines()
)
