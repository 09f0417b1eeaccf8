"""Wordings that decline, in other languages than English.

German, French, Spanish, Portuguese, Italian, Dutch, Russian, Chinese, Japanese, Korean and Arabic. As in English a phrase
must say that the speaker does not help, and not merely be sorry. Texts are lower case, with straight apostrophes.
"""

from __future__ import annotations

import re

_TO_STOP, _WITHIN = r"[^.!?\n]", r"[^.!?,;\n]"

_GERMAN_HELPING = (
    r"(?:weiter)?(?:helfen|geben|machen)|beantworten|antworten|tun|unterstützen|schreiben|erklären|erstellen|liefern|"
    r"bereitstellen|nennen|teilen|anbieten|erteilen|verraten|mitwirken|mitmachen|nachkommen|behilflich|erfüllen|verfassen"
)
_GERMAN = (
    rf"\b(?:kann|darf|werde|möchte|will|könnte|würde) ich\b{_TO_STOP}{{0,50}}?\b(?:nicht|kein\w*|nie)\b{_TO_STOP}{{0,60}}?"
    rf"\b(?:{_GERMAN_HELPING})\b",
    rf"\bich (?:kann|darf|werde|möchte|will|könnte|würde)\b{_TO_STOP}{{0,50}}?\b(?:nicht|kein\w*|nie)\b{_TO_STOP}{{0,60}}?"
    rf"\b(?:{_GERMAN_HELPING})\b",
    r"\b(?:helfe|unterstütze|beantworte|schreibe|erkläre|gebe|mache|tue) ich\b[^.!?\n]{0,40}?\b(?:nicht(?! nur)|kein\w*)\b",
    r"\bich (?:helfe|unterstütze|beantworte|schreibe|erkläre)\b[^.!?\n]{0,40}?\b(?:nicht(?! nur)|kein\w*)\b",
    r"\bich (?:bin|sehe mich) (?:leider )?(?:nicht in der lage|außerstande|nicht befugt|nicht bereit)\b",
    rf"\b(?:ich (?:muss|möchte|werde)|(?:muss|möchte|werde) ich)\b{_TO_STOP}{{0,60}}?\b(?:ablehnen|verweigern)\b",
    r"\bich (?:lehne|weigere mich|verweigere)\b",
    r"\bverstößt gegen (?:meine|unsere|die) \w*(?:richtlinien|grundsätze|regeln)\b",
)
_FRENCH_HELPING = (
    r"aider|aide\b|répondre|fournir|donner|écrire|expliquer|assister|traiter|faire|partager|rédiger|créer|accéder|participer|"
    r"satisfaire|mesure|possible|montrer|dire comment"
)
_FRENCH = (
    rf"\bje n(?:e |')(?:\w+ )?(?:peux|puis|vais|veux|suis|souhaite|pourrai|saurais)\b{_WITHIN}{{0,40}}?"
    rf"\b(?:pas|point|en aucun cas)\b{_WITHIN}{{0,50}}?\b(?:{_FRENCH_HELPING})",
    rf"\bje ne peux (?:malheureusement |hélas )?pas\b{_WITHIN}{{0,40}}?(?:{_FRENCH_HELPING})",
    r"\bje (?:préfère|préférerais) ne pas\b",
    r"\bje (?:refuse|décline)\b|\bje (?:dois|me vois)\b[^.!?\n]{0,30}\b(?:refuser|décliner|rejeter)\b",
    r"\bil m'est (?:impossible|interdit)\b|\bà l'encontre de (?:mes|nos)\b",
)
_SPANISH_HELPING = (
    r"ayud|proporcion|dar\b|darte|darle|cumplir|escribir|responder|ofrecer|asist|facilit|explicar|hacerlo|hacer eso|compart|"
    r"complacer|crear|particip|generar|atender|satisfacer"
)
_SPANISH = (
    rf"\bno (?:te |le |me )?(?:puedo|voy a|podré|podría|quiero|debo|estoy dispuest[oa] a|es posible|soy capaz de|"
    rf"estoy en condiciones de|tengo permitido|estoy autorizad[oa] a|está permitido){_TO_STOP}{{0,40}}?"
    rf"(?:{_SPANISH_HELPING})",
    r"\bme niego\b|\b(?:debo|tengo que|he de) (?:rechazar|declinar|negarme)\b",
)
_PORTUGUESE = (
    r"\bnão (?:posso|vou|consigo|irei|poderei|quero|devo|me é (?:permitido|possível)|"
    rf"estou (?:apt[oa]|dispost[oa]|autorizad[oa])){_TO_STOP}{{0,40}}?(?:ajud|fornec|escrev|respond|\bdar\b|fazer isso|"
    r"oferec|auxili|explic|compartilh|atend|cumprir|criar|particip)",
    r"\b(?:eu )?(?:me )?recuso(?:-me)?\b|\b(?:devo|tenho que|preciso) (?:recusar|negar)\b",
)
_ITALIAN = (
    r"\bnon (?:posso|sono in grado di|mi è possibile|voglio|intendo|ho intenzione di|mi è permesso|potrò)"
    rf"{_TO_STOP}{{0,40}}?(?:aiut|forni|rispond|\bdar|scriv|spieg|assist|\bfarlo|condivid|soddisf|partecip)",
    r"\bdevo (?:rifiutare|declinare)\b|\bmi rifiuto\b",
)
_DUTCH = (
    rf"\b(?:ik (?:kan|mag|zal|wil|ga)|(?:kan|mag|zal|wil|ga) ik)\b{_TO_STOP}{{0,40}}?\b(?:niet|geen)\b{_TO_STOP}{{0,50}}?"
    r"\b(?:helpen|beantwoorden|geven|schrijven|uitleggen|doen|verstrekken|delen|meewerken)\b",
    rf"\b(?:ik (?:kan|mag|zal)|(?:kan|mag|zal) ik)\b{_TO_STOP}{{0,40}}?\b(?:niet|geen)\b{_TO_STOP}{{0,30}}?"
    r"\b(?:beantwoorden|helpen)\b",
    r"\bik weiger\b|\bik moet\b[^.!?\n]{0,40}\b(?:weigeren|afwijzen)\b",
)
_RUSSIAN_HELPING = (
    r"помо[гч]|отвеч|ответ|дава|дать|предостав|делать|сделать|писа|объясн|рассказ|выполн|участв|поддерж|содейств"
)
_RUSSIAN = (
    rf"\bне (?:могу|буду|стану|имею права|в состоянии|смогу|готов\w*|вправе|хочу){_TO_STOP}{{0,40}}?(?:{_RUSSIAN_HELPING})",
    rf"(?:{_RUSSIAN_HELPING})\w*{_TO_STOP}{{0,20}}? не (?:буду|стану|могу|смогу)\b",
    r"\bне (?:помогу|отвечу|напишу|скажу|расскажу)\b|\bотказываюсь\b|\bвынужден\w* отказать",
)
_CHINESE_NOT = r"(?:不能|无法|無法|不会|不會|不可以|没有办法|沒有辦法|没办法|不便|不愿意?|不予)"
_CHINESE = (
    rf"(?:我|抱歉|对不起|對不起|遗憾|遺憾|恕)[^。！？\n]{{0,16}}?{_CHINESE_NOT}[^。！？，\n]{{0,14}}?"
    r"(?:帮|幫|协助|協助|提供|回答|满足|滿足|告诉|告訴|完成|支持|写|寫|生成|给出|参与|處理|处理|做)",
    r"帮不了|幫不了|(?:必须|只能|不得不)拒[绝絕]|我拒[绝絕]|恕我?(?:不能|无法|無法|不)",
)
_JAPANESE = (
    r"(?:お応え|お答え|答え|お手伝い|手伝|ご協力|提供|協力|回答|対応|ご案内|お教え|教え|お伝え|支援|お受け)"
    r"[^。！？\n]{0,12}(?:できません|できかねます|かねます|しません|いたしません|ません|わけにはいきません|できない)",
)
_KOREAN = (
    r"(?:도와|도움|제공|답변|협조|대답|응답|알려|지원|작성|도울)[^.!?。\n]{0,16}"
    r"(?:수 없|수가 없|않겠|어렵습니다|어려워요|못합니다|불가)",
    r"(?:거절|거부)(?:하겠|합니다|해야)",
)
_ARABIC = (
    r"(?:لا (?:أستطيع|يمكنني|أقدر|أريد)|لن أ\w*|غير قادر|ليس بإمكاني)[^.!؟\n]{0,30}?"
    r"(?:مساعد|تقديم|الإجابة|أساعد|أجيب|إعطاء|كتابة|توفير|المشاركة|أقدم)",
    r"\bأرفض\b|يتعارض مع (?:مبادئي|سياس|إرشادات)|ولن أنفذ",
)

REFUSALS = re.compile(
    "|".join(
        (
            *(*_GERMAN, *_FRENCH, *_SPANISH, *_PORTUGUESE, *_ITALIAN, *_DUTCH),
            *(*_RUSSIAN, *_CHINESE, *_JAPANESE, *_KOREAN, *_ARABIC),
        )
    )
)
"""What declines wherever it stands in an answer."""
