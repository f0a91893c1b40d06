// Texts to start with, one set a task.

const guide = (section, text) => `Operations guide, chapter 4: keeping services fast. ${section}: ${text}`;

export const EXAMPLES = {
  rerank: {
    query: "How do I keep the first request after a quiet night from being slow?",
    instruction: "Given a question of an operator, find the passages that answer it",
    split: "lines",
    documents: [
      guide("Cold starts", "An instance that was scaled to zero loads its model on the first request. Keep one instance "
        + "warm during the night, or send it a small request every few minutes."),
      guide("Cold starts", "Loading weights from local disk instead of object storage cuts the time until the first "
        + "answer from minutes to seconds."),
      guide("Queues", "A request that waits longer than its deadline should be dropped before it costs anything; answer "
        + "429 at once instead of letting the queue grow."),
      guide("Queues", "Large batches help throughput and hurt latency. Measure both at the load that you expect, not at "
        + "the highest that fits."),
      "Release notes 2.3: the scheduler now wakes idle workers before the morning peak, from the load of the days before.",
      "Release notes 2.3: the dashboard has a dark theme, and tables can be sorted by any column.",
      "Soup of the day: roast the tomatoes with garlic for forty minutes, then blend them with a cup of warm stock.",
      "The night bus to the airport leaves every thirty minutes from the north side of the station.",
    ],
  },
  embed: {
    query: "",
    instruction: "Instruct: Given a question, find questions that ask the same\nQuery: ",
    split: "lines",
    documents: [
      "How do I reset my password?",
      "How do I reset my password if I no longer have the phone?",
      "I forgot my password, what now?",
      "Which payment methods do you take?",
      "Which payment methods do you take in Switzerland?",
      "Can I pay by bank transfer?",
      "When will my parcel arrive?",
      "Where is my order? It should have arrived last week.",
    ],
  },
  classify: {
    query: "",
    instruction: "",
    split: "lines",
    documents: [
      "Review of the Hotel Alpina: we stayed three nights, and the view from the balcony alone was worth it.",
      "Review of the Hotel Alpina: we stayed three nights and slept through none of them; the bar below is open until four.",
      "Review of the Hotel Alpina: the room was as in the pictures, breakfast was breakfast.",
      "Review of the Lake House: the kindest hosts that we have met, and a boat that guests may take.",
      "Review of the Lake House: the heating failed on the first day, and nobody came to look at it.",
    ],
  },
  score: {
    query: "Question: A kettle takes four minutes to boil one litre of water. How long does it take for two litres, if it "
      + "heats at the same power?\nAnswer:",
    instruction: "",
    split: "lines",
    documents: [" Eight minutes", " Four minutes", " Two minutes", " Sixteen minutes", " That depends on the cup"],
  },
  decide: {
    query: "Message of a customer: The parcel came two weeks late and the lamp in it was broken. I called twice and nobody "
      + "called back. I want my money back by Friday, or I will write about it everywhere.",
    instruction: "",
    split: "lines",
    documents: [
      "Does the customer ask for a refund?",
      "Does the customer mention a deadline?",
      "What went wrong first? | delivery | product | service | billing",
      "Who should read this? | support | warehouse | a manager",
      "How angry is the customer? | calm < annoyed < angry < furious",
    ],
  },
};

/** What a task calls its fields; null where it has none. */
export const FIELDS = {
  rerank: {
    name: "Rerank", query: "Query", documents: "Documents", noun: "document", instruction: "Instruction",
    note: "What relevant means; the model's own unless given.",
  },
  embed: {
    name: "Embed", query: null, documents: "Texts", noun: "text", instruction: "Prompt",
    note: "Put before every text as it is, also spaces and line ends.",
  },
  classify: { name: "Classify", query: null, documents: "Texts", noun: "text", instruction: null, note: "" },
  decide: {
    name: "Decide", query: "State", documents: "Questions", noun: "question", instruction: null, note: "",
    hint: "Yes or no: a question alone. A choice: question | option | option. A scale: question | low < middle < high.",
  },
  score: {
    name: "Score", query: "Context", documents: "Continuations", noun: "continuation", instruction: null, note: "",
  },
};
